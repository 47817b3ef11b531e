"""Weight files of guidance methods, which determine images as the weights of the network do.

torch is loaded only for names of networks.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from sagl.errors import UserError, require
from sagl.models.hub_files import is_hub_name
from sagl.models.metadata import WEIGHT_SUFFIXES
from sagl.models.zoo import get_classifier_settings, get_unet_settings
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


def check_guidance_files(
    guidances: Mapping[str, GuidanceSettings], network: UNetSettings, diffusion: DiffusionSettings
) -> None:
    """Refuse weight files that do not exist and released networks that do not fit, before anything is downloaded.

    Files are not read. Names on the Hub and the head `auto` are looked up later.

    Raises:
        UserError: there is no such file, or `check_network_name` refuses a name.
    """
    for settings in guidances.values():
        for name in settings.file_settings if settings.scale else ():
            value = str(getattr(settings, name))
            if name == "checkpoint" and _is_network_name(value):
                check_network_name(f"{settings.group}.{name}", value, network, diffusion)
            elif value != AUTO:
                _find_file(settings, name, None)


def check_network_name(parameter: str, name: str, network: UNetSettings, diffusion: DiffusionSettings) -> None:
    """Refuse a released network that does not fit the one that it guides; a file or a network of the Hub is not read.

    Args:
        parameter: `classifier.checkpoint` for a classifier, that of another method for a UNet.
        name: its name or file.
        network: settings of the network that it guides.
        diffusion: process of that network.

    Raises:
        UserError: there is no network of this name, or it is for other images or another process.
    """
    if _is_network_name(name) and not is_hub_name(name):
        is_classifier = parameter == "classifier.checkpoint"
        second, process = (get_classifier_settings if is_classifier else get_unet_settings)(name, parameter)
        check_second_network(parameter, second, process, network, diffusion)


def _is_network_name(value: str) -> bool:
    """Return whether a value is the name of a network, here or on the Hub, and not a file."""
    return is_hub_name(value) or not (Path(value).is_file() or Path(value).suffix in WEIGHT_SUFFIXES)


def _find_file(settings: GuidanceSettings, name: str, checkpoint: Path | None) -> Path:
    """Return the weight file that a setting names: a head, a file or name of a network, or another file."""
    parameter, value = f"{settings.group}.{name}", str(getattr(settings, name))
    if name == "direction_head":
        return head_path(settings, checkpoint)
    if name == "checkpoint" and _is_network_name(value):
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
