"""Per-channel statistics and per-channel scaling, each with a backward pass of one multiply-add.

On a CPU, PyTorch's group normalisation of images in channels_last spends most of a training step of a small network
in its backward pass; these two functions, composed in `Norm`, take a fraction of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ELEMENTS_AT_ONCE = 2**17
"""Of each thread's part of a tensor: half a megabyte in float32."""
THREADS_SUMMED_FOR = 4
"""Sums are taken in parts for so many, however many there are: their last digits must not depend on it."""


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        parts = _pixels(x).split(_pixels_at_once(x, lambda: THREADS_SUMMED_FOR), dim=1)
        near = parts[0].mean(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
        total, squares = torch.zeros_like(near), torch.zeros_like(near)
        for part in parts:
            off = part - near[:, None]  # small beside x where the mean is large, so that no square cancels
            total += off.sum(dim=1)
            squares += off.square_().sum(dim=1)
        count = x[0, 0].numel()
        mean = near + total / count
        ctx.save_for_backward(x, mean)
        return mean, squares / count - (total / count).square()

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
        dtype = torch.promote_types(x.dtype, gain.dtype)  # inside, 16 bits would be too few for a large offset
        gain, offset = gain.to(dtype), offset.to(dtype)
        return _large(x, gain, offset) if x[0].numel() >= ELEMENTS_AT_ONCE else _small(x, gain, offset)

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


def _large(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """`channel_affine`, sample by sample: batch normalisation by a mean of 0 and a variance of 1 is one pass of it."""
    zero, one = torch.zeros_like(gain[0]), torch.ones_like(gain[0])
    samples = zip(x.split(1), gain, offset, strict=True)
    each = [F.batch_norm(sample, zero, one, a, b, eps=0.0) for sample, a, b in samples]
    return torch.cat(each) if len(each) > 1 else each[0]


def _small(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """`channel_affine` of all samples together, in parts that fit the caches."""
    y, at_once = torch.empty_like(x), _pixels_at_once(x, torch.get_num_threads)
    a, b = gain[:, None], offset[:, None]
    for part, out in zip(_pixels(x).split(at_once, dim=1), _pixels(y).split(at_once, dim=1), strict=True):
        out.copy_(torch.addcmul(b, part.to(a.dtype), a))
    return y


def _pixels(x: Tensor) -> Tensor:
    """(B, C, …) -> (B, L, C), a view where x is channels_last."""
    return x.flatten(2).mT if x.dim() > 2 else x[:, None]


def _pixels_at_once(x: Tensor, threads: Callable[[], int]) -> int:
    """So many that what is computed of them stays in the processor's caches; on other devices, and compiled, all."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, x[0, 0].numel())
    return max(1, ELEMENTS_AT_ONCE * threads() // (x.shape[0] * x.shape[1]))


def _each(value: Tensor, x: Tensor) -> Tensor:
    """(B, C) -> (B, C, 1, …) in x's dtype."""
    return value.view(*value.shape, *[1] * (x.dim() - 2)).to(x.dtype)
