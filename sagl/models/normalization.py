"""Adaptive group normalisation, on GPUs without a change of the memory layout or of the data type."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_GROUPS = 32
MIN_ELEMENTS = 2**20
"""Elements of a sample's features from which the moments below are faster on a GPU than its own kernel.

CUDA's kernel works in NCHW, so it copies features in channels_last twice. Smaller features cost launches, not traffic.
"""


def ada_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    """Compute (1 + scale) · norm(x) + shift in 32 groups: (B, C, …), scale and shift (B, C) or None -> like x.

    On a GPU the result has the data type of x under autocast too, which would use float32 and twice the memory;
    moments are accumulated in float32 either way.
    """
    if not _is_on_gpu(x):
        return _norm_and_affine(x, weight, bias, scale, shift, eps)
    with torch.autocast("cuda", enabled=False):
        if torch.compiler.is_compiling() or x.dim() < 4 or x.shape[1:].numel() < MIN_ELEMENTS:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            return _norm_and_affine(x, weight, bias, _cast(scale, x), _cast(shift, x), eps)
        return _channel_norm(x, weight, bias, scale, shift, eps)


def _is_on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _norm_and_affine(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    h = F.group_norm(x, NUM_GROUPS, weight, bias, eps)
    if scale is None or shift is None:
        return h
    return h * (1 + scale[..., None, None]) + shift[..., None, None]


def _cast(value: Tensor | None, x: Tensor) -> Tensor | None:
    return None if value is None else value.to(x.dtype)


def _channel_norm(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    """Compute `ada_group_norm` from the moments of every channel and one multiply-add of the features."""
    means, variances = (moment.unflatten(1, (NUM_GROUPS, -1)) for moment in _Moments.apply(x))
    mean = means.mean(dim=2, keepdim=True)
    variance = (variances + (means - mean).square()).mean(dim=2, keepdim=True)
    gain = (variance + eps).rsqrt() * weight.view(NUM_GROUPS, -1)
    offset = torch.addcmul(bias.view(NUM_GROUPS, -1), mean, gain, value=-1)
    gain, offset = gain.flatten(1), offset.flatten(1)
    if scale is not None and shift is not None:
        factor = 1 + scale.to(gain.dtype)
        gain, offset = gain * factor, torch.addcmul(shift, offset, factor)
    return _Affine.apply(x, gain, offset)


class _Moments(torch.autograd.Function):
    """Mean and variance of every channel: (B, C, H, W) -> 2 x (B, C), float32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Reduce over the pixels; 16-bit inputs are summed in float32."""
        if x.element_size() < 4:  # the results of var_mean would be rounded to 16 bits
            mean = x.mean(dim=(2, 3), dtype=torch.float32)
            norm = torch.linalg.vector_norm(x, dim=(2, 3), dtype=torch.float32)
            variance = torch.addcmul(norm.square() / x.shape[2:].numel(), mean, mean, value=-1).clamp_(min=0)
        else:
            variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_variance: Tensor) -> Tensor:  # noqa: ANN401
        x, mean = ctx.saved_tensors
        count = x.shape[2:].numel()
        slope = d_variance * (2 / count)
        return _multiply_add(x, slope, d_mean / count - slope * mean)


class _Affine(torch.autograd.Function):
    """x · gain + offset for every channel: (B, C, H, W), 2 x (B, C) -> like x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, gain)
        return _multiply_add(x, gain, offset)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        x, gain = ctx.saved_tensors
        d_gain = (d_y * x).sum(dim=(2, 3), dtype=gain.dtype)
        d_x = torch.mul(d_y, gain[..., None, None], out=torch.empty_like(d_y))
        return d_x, d_gain, d_y.sum(dim=(2, 3), dtype=gain.dtype)


def _multiply_add(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """Return x · gain + offset, computed in the data type of `gain` and stored in that of x by one kernel."""
    shape = (*gain.shape, 1, 1)
    return torch.addcmul(offset.view(shape), x, gain.view(shape), out=torch.empty_like(x))
