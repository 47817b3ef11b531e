"""Per-channel statistics and per-channel scaling, each with a backward pass of one multiply-add.

On a CPU, PyTorch's group normalisation of images in channels_last spends most of a training step of a small network
in its backward pass; these two functions, composed in `Norm`, take a fraction of it.
"""

from typing import Any

import torch
from torch import Tensor


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        pixels = _pixels(x)
        ctx.save_for_backward(x)
        mean = pixels.mean(dim=1, dtype=torch.float32)
        square = torch.linalg.vector_norm(pixels, dim=1, dtype=torch.float32).square() / pixels.shape[1]
        return mean, square

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_square: Tensor) -> Tensor:  # noqa: ANN401
        (x,) = ctx.saved_tensors
        count = x[0, 0].numel()
        return torch.addcmul(_each(d_mean / count, x), x, _each(d_square * (2 / count), x))


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, gain)
        return torch.addcmul(_each(offset, x), x, _each(gain, x))

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        x, gain = ctx.saved_tensors
        d_gain, d_offset = _pixels(d_y * x).sum(dim=1), _pixels(d_y).sum(dim=1)
        return d_y * _each(gain, x), d_gain.to(gain.dtype), d_offset.to(gain.dtype)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of every channel: (B, C, …) -> (B, C), (B, C) float32."""
    return _Moments.apply(x)


def channel_affine(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """x · gain + offset, channel by channel: (B, C, …), (B, C), (B, C) -> like x."""
    return _Affine.apply(x, gain, offset)


def _pixels(x: Tensor) -> Tensor:
    """(B, C, …) -> (B, L, C), a view where x is channels_last."""
    return x.flatten(2).mT if x.dim() > 2 else x[:, None]


def _each(value: Tensor, x: Tensor) -> Tensor:
    """(B, C) -> (B, C, 1, …) in x's dtype."""
    return value.view(*value.shape, *[1] * (x.dim() - 2)).to(x.dtype)
