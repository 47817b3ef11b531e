"""Weight files of guidance methods, which determine images as the weights of the network do.

torch is loaded only for names of networks.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from sagl.errors import UserError, require
from sagl.models.metadata import WEIGHT_SUFFIXES
from sagl.models.zoo import get_classifier_settings
from sagl.settings.compatibility import check_second_network
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import GuidanceSettings
from sagl.settings.network import UNetSettings
from sagl.utils.digest_cache import weights_sha256
from sagl.utils.files import file_version

AUTO = "auto"
"""Name of the head beside the weight file."""


def guidance_files(guidances: Mapping[str, GuidanceSettings], checkpoint: Path | None) -> dict[str, Path]:
    """Return the weight files in use by parameter, such as `autoguidance.checkpoint`; those of scale 0 are left out.

    Args:
        guidances: settings of guidance methods by name.
        checkpoint: weight file of the network, beside which direction head `auto` lies.

    Raises:
        UserError: a file does not exist, or cannot be downloaded.
    """
    return {
        f"{settings.group}.{name}": _find_file(settings, name, checkpoint)
        for settings in guidances.values()
        if settings.scale
        for name in settings.file_settings
    }


def guidance_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the sha256 of the files of `guidance_files` by parameter."""
    return {name: _digest(path, file_version(path)) for name, path in files.items()}


def head_path(settings: GuidanceSettings, checkpoint: Path | None) -> Path:
    """Return the file of a method's direction head.

    Args:
        settings: settings of the method, with a `direction_head`.
        checkpoint: weight file of the network, beside which `auto` looks.

    Raises:
        UserError: there is no such file.
    """
    parameter, name = f"{settings.group}.direction_head", settings.direction_head
    assert name is not None
    if name != AUTO:
        path = Path(name)
    else:
        require(checkpoint is not None, f"`{parameter}` must be a file for a network without a weight file, got auto.")
        assert checkpoint is not None
        path = checkpoint.with_name(f"{checkpoint.stem}_{settings.group}_head.safetensors")
    require(
        path.is_file(),
        f"`{parameter}` must be a file that sagl fit --config distil_direction made, and {path} does not exist.",
    )
    return path


def check_classifier_name(name: str, network: UNetSettings, diffusion: DiffusionSettings) -> None:
    """Refuse a released classifier that does not fit the network before it is downloaded; a file is not read.

    Raises:
        UserError: there is no classifier of this name, or it is for other images or another process.
    """
    parameter = "classifier.checkpoint"
    if not Path(name).is_file() and Path(name).suffix not in WEIGHT_SUFFIXES:
        check_second_network(parameter, *get_classifier_settings(name, parameter), network, diffusion)


def _find_file(settings: GuidanceSettings, name: str, checkpoint: Path | None) -> Path:
    """Return the weight file that a setting names: a head, a file or name of a network, or another file."""
    parameter, value = f"{settings.group}.{name}", str(getattr(settings, name))
    if name == "direction_head":
        return head_path(settings, checkpoint)
    if name == "checkpoint" and not Path(value).is_file():
        from sagl.models.loading import find_file

        try:
            return find_file(value)
        except UserError as error:
            raise UserError(f"`{parameter}` {value} cannot be used: {error}") from error
    require(Path(value).is_file(), f"`{parameter}` must be a file, and {value} does not exist.")
    return Path(value)


@lru_cache(maxsize=64)
def _digest(path: Path, _: bytes) -> str:
    """Return the sha256 of a version of a file, computed once."""
    return weights_sha256(path)
