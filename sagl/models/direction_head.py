"""Direction heads: small decoders that predict eps - eps_weak of a guidance method from the base evaluation."""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagl.models.layers import AdaGroupNorm, Conv1x1, conv3x3, timestep_embedding, zero_module
from sagl.settings.network import HeadSettings
from sagl.shapes import Image, Timestep

EMBEDDING = 64
"""Channels of the timestep embedding."""
COARSE_CHANNELS = 16
"""Channels to which the output of the last coarse stage is projected before it is upsampled."""
NUM_LEVELS = 50
"""Timesteps at which the sizes of direction and high-pass are stored, evenly spaced over the process."""


class Pairs(NamedTuple):
    """Inputs of a head, and what it is to predict: N steps of chains."""

    images: Tensor
    """(N, image_channels, H, W)."""
    maps: tuple[Tensor, ...]
    """(N, F, H', W') float16, one per resolution, the coarsest first."""
    timesteps: Timestep
    direction: Image
    """(N, C, H, W): eps - eps of the weak prediction."""

    def select(self, rows: Tensor) -> "Pairs":
        """Return the pairs of some rows."""
        maps = tuple(feature_map[rows] for feature_map in self.maps)
        return Pairs(self.images[rows], maps, self.timesteps[rows], self.direction[rows])

    @classmethod
    def concatenate(cls, parts: Iterable["Pairs"]) -> "Pairs":
        """Concatenate pairs; autocast would refuse maps in float16."""
        images, maps, timesteps, direction = zip(*parts, strict=True)
        with torch.autocast(images[0].device.type, enabled=False):
            joined_maps = tuple(torch.cat(tensors) for tensors in zip(*maps, strict=True))
            return cls(torch.cat(images), joined_maps, torch.cat(timesteps), torch.cat(direction))


class FilmConv(nn.Module):
    """3x3 convolution, whose output the timestep embedding scales and shifts (FiLM) before SiLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(in_channels, out_channels)
        self.film = zero_module(nn.Linear(EMBEDDING, 2 * out_channels))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, H, W), (B, EMBEDDING) -> (B, C', H, W)."""
        gain, offset = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        return F.silu(self.conv(x) * (1 + gain) + offset)


class CoarseStage(nn.Module):
    """One resolution below that of the image.

    It adds projections of the normalised map and of the images to the upsampled output of the coarser stage, and
    applies a residual convolution.
    """

    def __init__(self, map_channels: int, image_channels: int, width: int) -> None:
        super().__init__()
        self.norm = AdaGroupNorm(map_channels)
        self.project_map = Conv1x1(map_channels, width)
        self.project_images = Conv1x1(image_channels, width)
        self.conv = FilmConv(width, width)

    def forward(self, feature_map: Tensor, images: Tensor, coarser: Tensor | None, emb: Tensor) -> Tensor:
        """Return (B, width, H', W') features.

        Args:
            feature_map: (B, map_channels, H', W') map of the network.
            images: (B, image_channels, H, W), which are averaged to the size of the map.
            coarser: (B, width, H'/2, W'/2) output of the coarser stage, if there is one.
            emb: (B, EMBEDDING) timestep embedding.
        """
        size = (feature_map.shape[-2], feature_map.shape[-1])
        h = self.project_map(self.norm(feature_map)) + self.project_images(F.adaptive_avg_pool2d(images, size))
        if coarser is not None:
            h = h + F.interpolate(coarser, size=size, mode="nearest")
        return h + self.conv(h, emb)


class DirectionHead(nn.Module):
    """A small decoder of the network's feature maps, and a weight of every image input by the timestep.

    It has one stage for each resolution below that of the image, then hidden convolutions at full resolution. The scale
    of the guidance is no input: at a fixed x_t the direction does not depend on it. A new head predicts 0. `levels`
    holds the root mean squares of direction, high-pass and masked high-pass by timestep. Inputs and output are in
    these units.
    """

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        s = self.settings = settings
        *coarse_channels, last_channels = s.map_channels
        self.embed = nn.Sequential(nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU())
        self.coarse = nn.ModuleList(CoarseStage(n, s.image_channels, s.coarse_width) for n in coarse_channels)
        self.project_coarse = Conv1x1(s.coarse_width, COARSE_CHANNELS) if coarse_channels else None
        first_channels = last_channels + s.image_channels + (COARSE_CHANNELS if coarse_channels else 0)
        widths = [first_channels, *[s.width] * s.depth]
        self.convs = nn.ModuleList(FilmConv(a, b) for a, b in itertools.pairwise(widths))
        self.gains = zero_module(nn.Linear(EMBEDDING, s.num_images))
        self.out = zero_module(conv3x3(s.width, s.in_channels))
        self.levels = nn.Parameter(torch.ones(s.num_images - 1, NUM_LEVELS), requires_grad=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, maps: Sequence[Tensor], timesteps: Timestep) -> Image:
        """Predict the direction, in float32 or wider.

        Args:
            images: (B, image_channels, H, W) x_t, x0_hat, high-pass, and masked high-pass and mask if there is one.
            maps: feature maps of the base evaluation, one per resolution, the coarsest first: inputs of the last
                output blocks of the coarser resolutions, (B, map_channels[k], H', W'), and of the last convolution.
            timesteps: (B,) of the original process.
        """
        direction_level, *high_pass_levels = self.levels_at(timesteps).unbind()
        return direction_level[:, None, None, None] * self.normalized(images, maps, timesteps, high_pass_levels)

    def normalized(
        self, images: Tensor, maps: Sequence[Tensor], timesteps: Timestep, high_pass_levels: Iterable[Tensor]
    ) -> Image:
        """Predict the direction in units of its root mean square."""
        dtype, channels, num_images = self.out.weight.dtype, self.settings.in_channels, self.settings.num_images
        emb = self.embed(timestep_embedding(timesteps, EMBEDDING).to(dtype))
        divisors = torch.ones_like(images[:, :, 0, 0])
        for k, level in enumerate(high_pass_levels, start=2):
            divisors[:, k * channels : (k + 1) * channels] = level[:, None]
        scaled = (images / divisors[:, :, None, None]).to(dtype, memory_format=torch.channels_last)
        *coarse_maps, last_map = (feature_map.to(dtype) for feature_map in maps)
        inputs, coarse = [last_map, scaled], None
        for stage, feature_map in zip(self.coarse, coarse_maps, strict=True):
            coarse = stage(feature_map, scaled, coarse, emb)
        if self.project_coarse is not None:
            inputs.append(F.interpolate(self.project_coarse(coarse), size=images.shape[-2:], mode="nearest"))
        first, *others = self.convs
        h = first(torch.cat(inputs, dim=1), emb)
        for conv in others:
            h = h + conv(h, emb)
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


def is_same_network(expected: Sequence[float], network: nn.Module) -> bool:
    """Return whether a network has the root mean squares of another, as far as rounding to bfloat16 allows."""
    return is_same_rms(expected, network_rms(network))


def is_same_rms(expected: Sequence[float], actual: Sequence[float]) -> bool:
    """Return whether two results of `network_rms` agree, as far as rounding to bfloat16 allows."""
    if len(actual) != len(expected):
        return False
    return torch.allclose(torch.tensor(actual), torch.tensor(expected), rtol=2**-8, atol=1e-6)
