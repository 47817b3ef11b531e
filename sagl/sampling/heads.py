"""Direction heads of a pipeline: their files, and checks against the guidance and the network that they replace."""

from collections.abc import Mapping
from pathlib import Path

from sagl.errors import UserError, require
from sagl.models.adm import UNet
from sagl.models.checkpoints import build_head, read_checkpoint
from sagl.models.direction_head import DirectionHead, is_same_network
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import GuidanceSettings
from sagl.settings.network import HeadSettings
from sagl.utils.config_files import flatten
from sagl.utils.files import sha256

AUTO = "auto"
"""Name of the head beside the weight file."""


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


def load_head(
    settings: GuidanceSettings, has_mask: bool, network: UNet, diffusion: DiffusionSettings, checkpoint: Path | None
) -> DirectionHead:
    """Load the direction head of a method with the device and precision of the network.

    Args:
        settings: settings of the method.
        has_mask: whether the method has a mask.
        network: network that is guided.
        diffusion: its diffusion process.
        checkpoint: its weight file; see `head_path`.

    Raises:
        UserError: the file is no head, or its head belongs to another method, other settings or another network.
    """
    parameter, path = f"{settings.group}.direction_head", head_path(settings, checkpoint)
    try:
        file = read_checkpoint(path)
        head = build_head(file)
    except UserError as error:
        raise UserError(f"`{parameter}` {path} cannot be used: {error}") from error
    shape = file.model_settings
    assert isinstance(shape, HeadSettings)
    expected = {
        "method": settings.group,
        "in_channels": network.settings.in_channels,
        "map_channels": network.settings.map_channels,
        "has_mask": has_mask,
        "num_timesteps": diffusion.num_timesteps,
    }
    for name, value in expected.items():
        old = getattr(shape, name)
        require(old == value, f"`{parameter}` must be a head of {name} {value}, and {path} is one of {old!s:.60}.")
    trained = flatten(file.recommended)
    for name, value in settings.weak_prediction_settings.items():
        old = trained.get(f"{settings.group}.{name}")
        require(old == value, f"`{parameter}` {path} is for {settings.group}.{name} {old}, got {value}.")
    require(is_same_network(shape.network_rms, network), f"`{parameter}` {path} belongs to another network.")
    weight = next(network.parameters())
    head.to(device=weight.device, dtype=weight.dtype)
    head.levels.data = head.levels.data.float()
    return head


def head_digests(guidances: Mapping[str, GuidanceSettings], checkpoint: Path | None) -> dict[str, str]:
    """Return the sha256 of the heads in use, by method; they determine images as the weights do.

    Raises:
        UserError: a file does not exist.
    """
    return {
        name: sha256(head_path(settings, checkpoint))
        for name, settings in guidances.items()
        if settings.scale and settings.direction_head is not None
    }
