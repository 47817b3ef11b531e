"""Construction of the training of a direction head from a network and the settings of a guidance method."""

from collections.abc import Mapping

from sagl.errors import require
from sagl.guidance.registry import GUIDANCES
from sagl.models.checkpoints import build_network
from sagl.models.direction_head import network_rms
from sagl.models.loading import load
from sagl.modules.direction_head_module import DirectionHeadModule
from sagl.sampling.direction_pairs import ANY_STEPS, DirectionPairs
from sagl.sampling.pipeline import build_pipeline
from sagl.settings.direction_head import HeadTrainingSettings
from sagl.settings.guidance import GuidanceSettings
from sagl.settings.network import HeadSettings


def build_head_module(
    settings: HeadTrainingSettings, guidances: Mapping[str, GuidanceSettings], checkpoint: str | None, weights: str
) -> DirectionHeadModule:
    """Load the frozen network and build the module.

    Args:
        settings: settings of the training.
        guidances: settings of the guidance methods by name, of which `direction_head.method` is one.
        checkpoint: name or file of the network.
        weights: weights of a training checkpoint.

    Raises:
        UserError: there is no network, the method has no weak prediction, or it does not fit the network.
    """
    require(checkpoint is not None, "`checkpoint` must be the network that the head belongs to, got none.")
    assert checkpoint is not None
    options, name = settings.direction_head, settings.direction_head.method
    heads = [method for method, entry in GUIDANCES.items() if entry.settings_class.has_weak_prediction]
    require(name in heads, f"`model.direction_head.method` must be one of {', '.join(heads)}, got {name!r}.")
    guidance = guidances[name]
    file = load(checkpoint, weights)
    network, num_timesteps = build_network(file), file.diffusion.num_timesteps
    require(
        options.num_steps[1] <= num_timesteps,
        f"`direction_head.num_steps` must be at most {num_timesteps}, got {options.num_steps[1]!s:.60}.",
    )
    pipeline = build_pipeline(network, file.diffusion, ANY_STEPS)
    source = DirectionPairs(pipeline=pipeline, guidance=guidance, options=options, seed=settings.seed)
    head = HeadSettings(
        method=name,
        in_channels=network.settings.in_channels,
        map_channels=network.settings.map_channels,
        has_mask=source.has_mask,
        num_timesteps=num_timesteps,
        width=options.width,
        depth=options.depth,
        coarse_width=options.coarse_width,
        network_rms=network_rms(network),
    )
    return DirectionHeadModule(settings, head, file.diffusion, source)
