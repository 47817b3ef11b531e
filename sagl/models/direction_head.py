"""Direction heads: a few convolutions that predict eps - eps_weak of a guidance method from the base evaluation."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagl.models.layers import conv3x3, timestep_embedding, zero_module
from sagl.settings.network import HeadSettings
from sagl.shapes import Image, Timestep

EMBEDDING = 64
"""Channels of the timestep embedding."""
NUM_LEVELS = 50
"""Timesteps at which the sizes of direction and high-pass are stored, evenly spaced over the process."""


class Pairs(NamedTuple):
    """Inputs of a head, and what it is to predict: N steps of chains."""

    images: Tensor
    """(N, image_channels, H, W)."""
    features: Tensor
    """(N, F, H, W) float16."""
    timesteps: Timestep
    direction: Image
    """(N, C, H, W): eps - eps of the weak prediction."""

    def select(self, rows: Tensor) -> "Pairs":
        """Return the pairs of some rows."""
        return Pairs(*(tensor[rows] for tensor in self))

    @classmethod
    def concatenate(cls, parts: Iterable["Pairs"]) -> "Pairs":
        """Concatenate pairs; autocast would refuse features in float16."""
        columns = list(zip(*parts, strict=True))
        with torch.autocast(columns[0][0].device.type, enabled=False):
            return cls(*(torch.cat(tensors) for tensors in columns))


class DirectionHead(nn.Module):
    """Hidden convolutions with FiLM by the timestep, and a weight of every image input by the timestep.

    The scale of the guidance is no input: at a fixed x_t the direction does not depend on it. A new head predicts 0.
    `levels` holds the root mean squares of direction, high-pass and masked high-pass by timestep. Inputs and output
    are in these units.
    """

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        s = self.settings = settings
        widths = [s.feature_channels + s.image_channels, *[s.width] * s.depth]
        self.convs = nn.ModuleList(conv3x3(a, b) for a, b in itertools.pairwise(widths))
        self.embed = nn.Sequential(nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU())
        self.films = nn.ModuleList(zero_module(nn.Linear(EMBEDDING, 2 * s.width)) for _ in range(s.depth))
        self.gains = zero_module(nn.Linear(EMBEDDING, s.num_images))
        self.out = zero_module(conv3x3(s.width, s.in_channels))
        self.levels = nn.Parameter(torch.ones(s.num_images - 1, NUM_LEVELS), requires_grad=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, features: Tensor, timesteps: Timestep) -> Image:
        """Predict the direction, in float32 or wider.

        Args:
            images: (B, image_channels, H, W) x_t, x0_hat, high-pass, and masked high-pass and mask if there is one.
            features: (B, feature_channels, H, W) last feature map of the base evaluation.
            timesteps: (B,) of the original process.
        """
        direction_level, *high_pass_levels = self.levels_at(timesteps).unbind()
        return direction_level[:, None, None, None] * self.normalized(images, features, timesteps, high_pass_levels)

    def normalized(
        self, images: Tensor, features: Tensor, timesteps: Timestep, high_pass_levels: Iterable[Tensor]
    ) -> Image:
        """Predict the direction in units of its root mean square."""
        dtype, channels, num_images = self.out.weight.dtype, self.settings.in_channels, self.settings.num_images
        emb = self.embed(timestep_embedding(timesteps, EMBEDDING).to(dtype))
        divisors = torch.ones_like(images[:, :, 0, 0])
        for k, level in enumerate(high_pass_levels, start=2):
            divisors[:, k * channels : (k + 1) * channels] = level[:, None]
        scaled = (images / divisors[:, :, None, None]).to(dtype, memory_format=torch.channels_last)
        h = torch.cat([features.to(dtype), scaled], dim=1)
        for k, (conv, film) in enumerate(zip(self.convs, self.films, strict=True)):
            gain, offset = film(emb)[:, :, None, None].chunk(2, dim=1)
            update = F.silu(conv(h) * (1 + gain) + offset)
            h = h + update if k else update
        by_image = scaled[:, : num_images * channels].unflatten(1, (num_images, channels))
        weighted = torch.einsum("bn,bnchw->bchw", self.gains(emb), by_image)
        return (self.out(h) + weighted).to(images.dtype)

    def levels_at(self, timesteps: Timestep) -> Tensor:
        """Interpolate `levels` linearly: (B,) -> (num_images - 1, B)."""
        position = timesteps.to(self.levels.dtype) * (NUM_LEVELS - 1) / max(1, self.settings.num_timesteps - 1)
        low = position.floor().clamp(0, NUM_LEVELS - 2).long()
        return torch.lerp(self.levels[:, low], self.levels[:, low + 1], position - low)


def network_rms(network: nn.Module) -> tuple[float, ...]:
    """Return the root mean square of each tensor of a network, in the order of their names.

    It identifies the network whatever the precision of its weights: see `is_same_network`.
    """
    tensors = sorted(network.state_dict().items())
    return tuple(float(tensor.float().square().mean().sqrt()) for _, tensor in tensors)


def is_same_network(expected: tuple[float, ...], network: nn.Module) -> bool:
    """Return whether a network has the root mean squares of another, as far as rounding to bfloat16 allows."""
    actual = torch.tensor(network_rms(network))
    return len(actual) == len(expected) and torch.allclose(actual, torch.tensor(expected), rtol=2**-8, atol=1e-6)
