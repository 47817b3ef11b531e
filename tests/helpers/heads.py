"""Direction heads with random weights, for the tiny grey network and its self-attention guidance."""

import torch

from sagl.models.checkpoints import NetworkWeights, write_checkpoint
from sagl.models.direction_head import DirectionHead, network_rms
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.network import HeadSettings
from tests.helpers.networks import draw_weights, grey_unet

SAG = SelfAttentionGuidance(site="output.0", blur_sigma=1.0)
SHAPE = {"in_channels": 1, "map_channels": (32,), "has_mask": True, "num_timesteps": 1000}
SHAPE |= {"width": 8, "depth": 2, "coarse_width": 8}


def head_settings(network=None, **changes):
    """Return the settings of a head of SAG for a network, by default the tiny grey one."""
    rms = network_rms(network or grey_unet())
    return HeadSettings(**{"method": "sag", **SHAPE, "network_rms": rms, **changes})


def random_head(**changes):
    """Return a head that does not predict zero."""
    head = draw_weights(DirectionHead(head_settings(**changes)), 2).requires_grad_(False)
    head.levels.copy_(torch.linspace(0.5, 2, head.levels.numel()).view_as(head.levels))
    return head


def write_head(path, head=None, guidance=SAG):
    """Write a head as a file that was made for the settings of a guidance; return the path."""
    head = head or random_head()
    content = NetworkWeights(
        model_settings=head.settings,
        diffusion=DiffusionSettings(),
        state_dict=head.state_dict(),
        recommended={guidance.group: guidance.weak_prediction_settings},
    )
    write_checkpoint(content, path)
    return path
