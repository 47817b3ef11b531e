"""Direction heads of a pipeline, checked against the guidance and the network that they replace."""

from pathlib import Path

from sagl.errors import UserError, require
from sagl.models.adm import UNet
from sagl.models.checkpoints import build_head, read_checkpoint
from sagl.models.direction_head import DirectionHead, is_same_network
from sagl.sampling.guidance_files import head_path
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import GuidanceSettings
from sagl.settings.network import HeadSettings
from sagl.utils.config_files import flatten


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
    weight, levels = next(network.parameters()), head.levels.data
    head.to(device=weight.device, dtype=weight.dtype)
    head.levels.data = levels.to(weight.device)  # in float32, as in the file
    return head
