"""Per-channel statistics and per-channel scaling, each with a backward pass of one multiply-add.

On a CPU, PyTorch's group normalisation of images in channels_last spends most of a training step of a small network
in its backward pass; these two functions, composed in `Norm`, take a fraction of it.
"""

from typing import Any

import torch
from torch import Tensor

ELEMENTS_AT_ONCE = 2**17
"""Of each thread's part of a tensor: half a megabyte in float32."""


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        pixels, dtype = _pixels(x), torch.promote_types(x.dtype, torch.float32)
        mean = pixels.mean(dim=1, dtype=dtype)
        squares = torch.zeros_like(mean)
        for part in pixels.split(_pixels_at_once(x), dim=1):
            squares += (part - mean[:, None]).square_().sum(dim=1)  # E[x²] - E[x]² would cancel
        ctx.save_for_backward(x, mean)
        return mean, squares / pixels.shape[1]

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_variance: Tensor) -> Tensor:  # noqa: ANN401
        x, mean = ctx.saved_tensors
        count = x[0, 0].numel()
        slope = d_variance * (2 / count)
        return torch.addcmul(_each(d_mean / count - slope * mean, x), x, _each(slope, x))


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, gain)
        y, at_once = torch.empty_like(x), _pixels_at_once(x)
        dtype = torch.promote_types(x.dtype, gain.dtype)  # inside, 16 bits would be too few for a large offset
        a, b = gain.to(dtype)[:, None], offset.to(dtype)[:, None]
        for part, out in zip(_pixels(x).split(at_once, dim=1), _pixels(y).split(at_once, dim=1), strict=True):
            out.copy_(torch.addcmul(b, part.to(dtype), a))
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        x, gain = ctx.saved_tensors
        d_gain, d_offset = _pixels(d_y * x).sum(dim=1), _pixels(d_y).sum(dim=1)
        return d_y * _each(gain, x), d_gain.to(gain.dtype), d_offset.to(gain.dtype)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel: (B, C, …) -> (B, C), (B, C), float32 or better."""
    return _Moments.apply(x)


def channel_affine(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """The affine map x · gain + offset, channel by channel: (B, C, …), (B, C), (B, C) -> like x."""
    return _Affine.apply(x, gain, offset)


def _pixels(x: Tensor) -> Tensor:
    """(B, C, …) -> (B, L, C), a view where x is channels_last."""
    return x.flatten(2).mT if x.dim() > 2 else x[:, None]


def _pixels_at_once(x: Tensor) -> int:
    """So many that what is computed of them stays in the processor's caches; on other devices, and compiled, all."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, x[0, 0].numel())
    return max(1, ELEMENTS_AT_ONCE * torch.get_num_threads() // (x.shape[0] * x.shape[1]))


def _each(value: Tensor, x: Tensor) -> Tensor:
    """(B, C) -> (B, C, 1, …) in x's dtype."""
    return value.view(*value.shape, *[1] * (x.dim() - 2)).to(x.dtype)
