"""Layers of the ADM networks: timestep embedding, normalisation, activation, convolutions and resampling."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagl.models.normalization import NUM_GROUPS, ada_group_norm
from sagl.shapes import Timestep

Layer = TypeVar("Layer", bound=nn.Module)


def timestep_embedding(timesteps: Timestep, dim: int) -> Tensor:
    """Embed timesteps as cosines, then sines, at geometric frequencies 1 … 1/10000: (B,) -> (B, dim) float32."""
    half = dim // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * exponents.exp()
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class AdaGroupNorm(nn.GroupNorm):
    """Adaptive group normalisation (ADM, section 3.1): (1 + scale) · norm(x) + shift, in 32 groups."""

    def __init__(self, channels: int) -> None:
        super().__init__(NUM_GROUPS, channels)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Normalise x (B, C, …); `scale` and `shift` are (B, C), or None for plain group normalisation."""
        return ada_group_norm(x, self.weight, self.bias, scale, shift, self.eps)


class SiLU(nn.SiLU):
    """SiLU that overwrites its input if no gradient is recorded. Use it only on tensors that nothing else reads."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


class Conv1x1(nn.Conv1d):
    """A 1x1 convolution as one matrix product over channels_last features: (B, C, …) -> (B, C', …).

    Its weight has the three dimensions of the Conv1d in OpenAI's code.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class LabelEmbedding(nn.Embedding):
    """An embedding that draws no weights on the meta device, where `normal_` imports the compiler for two seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the resolution."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def zero_module(layer: Layer) -> Layer:
    """Set all parameters of the layer to zero and return it."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2): a strided convolution if `use_conv`, otherwise average pooling."""

    def __init__(self, channels: int, *, use_conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbour, followed by a convolution if `use_conv`."""

    def __init__(self, channels: int, *, use_conv: bool) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
