"""Layers that are faster than PyTorch's on CPUs, at the same parameter names.

- `MomentGroupNorm`: group normalisation whose backward pass is one multiply-add; PyTorch's takes most of a training
  step of a small network in channels_last.
- `RowConv2d`, `RowConv1x1`: 1x1 convolutions row by row, in half the time of the matrix product on some processors.
- `WinogradConv2d`: large 3x3 convolutions with a quarter of the multiplications.

Measurements are in docs/speed.md.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagl.models.layers import AdaGroupNorm, Conv1x1
from sagl.utils.environment import has_amx

Network = TypeVar("Network", bound=nn.Module)


def optimize_for_cpu(network: Network) -> Network:
    """Replace layers in place by equivalents that are faster on CPUs, and return the network.

    Parameters, their names and the state dict do not change. On other devices and under torch.compile the replaced
    layers compute as before, so the network may still be moved.
    """
    use_winograd = prefer_winograd()
    for layer in network.modules():
        kind = type(layer)
        if kind is AdaGroupNorm:
            layer.__class__ = MomentGroupNorm
        elif kind is Conv1x1:
            layer.__class__ = RowConv1x1
        elif isinstance(layer, nn.Conv2d) and kind is nn.Conv2d:
            if layer.kernel_size == (1, 1):
                layer.__class__ = RowConv2d
            elif use_winograd and WinogradConv2d.can_replace(layer):
                layer.__class__ = WinogradConv2d
    return network


def _use_kernel(x: Tensor) -> bool:
    """Return whether a layer computes with the kernels below; a compiled graph has its own kernels."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


# ------------------------------------------------------------------------------------- group normalisation

CHUNK = 2**19
"""Elements whose moments are summed at a time: they stay in the processor's caches."""

MIN_BATCH_NORM_ELEMENTS = 2**15
"""Elements of a sample in 16 bits from which one batch normalisation per sample is the faster affine map."""


class MomentGroupNorm(AdaGroupNorm):
    """Adaptive group normalisation as channel moments and one affine map of every channel."""

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Normalise as `AdaGroupNorm.forward`."""
        if not _use_kernel(x):
            return super().forward(x, scale, shift)
        means, variances = (moment.unflatten(1, (32, -1)) for moment in _Moments.apply(x))
        mean = means.mean(dim=2)
        variance = variances.mean(dim=2) + means.var(dim=2, correction=0)
        group_size = self.num_channels // 32
        gain = (variance + self.eps).rsqrt().repeat_interleave(group_size, dim=1) * self.weight
        offset = self.bias - mean.repeat_interleave(group_size, dim=1) * gain
        if scale is not None and shift is not None:
            gain, offset = gain * (1 + scale), offset * (1 + scale) + shift
        return _Affine.apply(x, gain, offset)


class _Moments(torch.autograd.Function):
    """Mean and variance of every channel: (B, C, …) -> 2 x (B, C), float32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Sum in chunks, after subtracting the mean of the first one."""
        chunks = _pixels(x).split(max(1, CHUNK // x.shape[:2].numel()), dim=1)
        shift = chunks[0].mean(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
        total, squares = torch.zeros_like(shift), torch.zeros_like(shift)
        for chunk in chunks:
            centered = chunk - shift[:, None]  # small compared with x if the mean is large, so that no square cancels
            total += centered.sum(dim=1)
            squares += centered.square_().sum(dim=1)
        count = x[0, 0].numel()
        mean = shift + total / count
        ctx.save_for_backward(x, mean)
        return mean, squares / count - (total / count).square()

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_variance: Tensor) -> Tensor:  # noqa: ANN401
        x, mean = ctx.saved_tensors
        count = x[0, 0].numel()
        slope = d_variance * (2 / count)
        offset = d_mean / count - slope * mean
        return torch.addcmul(_broadcast(offset, x).to(x.dtype), x, _broadcast(slope, x).to(x.dtype))


class _Affine(torch.autograd.Function):
    """x · gain + offset for every channel: (B, C, …), 2 x (B, C) -> like x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:  # noqa: ANN401
        """Apply one multiply-add, or batch normalisation without moments to large maps in 16 bits."""
        ctx.save_for_backward(x, gain)
        dtype = torch.promote_types(x.dtype, gain.dtype)  # 16 bits are too few for a large offset
        gain, offset = gain.to(dtype), offset.to(dtype)
        if x.dtype == dtype or x[0].numel() < MIN_BATCH_NORM_ELEMENTS:
            return torch.addcmul(_broadcast(offset, x), x, _broadcast(gain, x)).to(x.dtype)
        zero, one = torch.zeros_like(gain[0]), torch.ones_like(gain[0])
        samples = zip(x.split(1), gain, offset, strict=True)  # batch norm converts to float32 and back in one pass
        return torch.cat([F.batch_norm(sample, zero, one, a, b, eps=0.0) for sample, a, b in samples])

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        x, gain = ctx.saved_tensors
        d_gain, d_offset = _pixels(d_y * x).sum(dim=1), _pixels(d_y).sum(dim=1)
        return d_y * _broadcast(gain, x).to(x.dtype), d_gain.to(gain.dtype), d_offset.to(gain.dtype)


def _pixels(x: Tensor) -> Tensor:
    """(B, C, …) -> (B, L, C), a view if x is channels_last."""
    return x.flatten(2).mT if x.dim() > 2 else x[:, None]


def _broadcast(value: Tensor, x: Tensor) -> Tensor:
    """(B, C) -> (B, C, 1, …), as many dimensions as x has."""
    return value.view(*value.shape, *[1] * (x.dim() - 2))


# -------------------------------------------------------------------------------------------- 1x1 convolutions

MAX_LINEAR_WIDTH = 8
"""Width of a feature map, in pixels, up to which a matrix product is faster than PyTorch's convolution."""


class RowConv1x1(Conv1x1):
    """`Conv1x1` that uses `conv1x1` on feature maps."""

    def forward(self, x: Tensor) -> Tensor:
        return conv1x1(x, self.weight, self.bias) if x.dim() == 4 and _use_kernel(x) else super().forward(x)


class RowConv2d(nn.Conv2d):
    """A 1x1 convolution that uses `conv1x1`."""

    def forward(self, x: Tensor) -> Tensor:
        return conv1x1(x, self.weight, self.bias) if _use_kernel(x) else super().forward(x)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution of feature maps in channels_last: (B, C, H, W) -> (B, C', H, W).

    Every row is a separate image for PyTorch's convolution, which is up to twice as fast as a matrix product in
    float32; narrow maps are one matrix product.
    """
    pixels, weight = x.permute(0, 2, 3, 1), weight.flatten(1)
    if x.shape[-1] <= MAX_LINEAR_WIDTH:
        return F.linear(pixels, weight, bias).permute(0, 3, 1, 2)
    rows = pixels.flatten(0, 1)[:, None].permute(0, 3, 1, 2)  # (B·H, C, 1, W)
    out = F.conv2d(rows, weight[..., None, None], bias)
    return out.permute(0, 2, 3, 1).unflatten(0, (len(x), -1))[:, :, 0].permute(0, 3, 1, 2)


# -------------------------------------------------------------------------------------------- 3x3 convolutions

MIN_SIDE, MIN_CHANNELS = 64, 64
"""Side of a feature map in pixels, and number of channels, from which Winograd's convolution is the faster one."""
STRIP = 2**24
"""Elements that exist at one time between the transforms: 64 MB in float32."""
G = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64) / 24


def prefer_winograd() -> bool:
    """Return whether Winograd's convolution is used on this processor.

    It trades multiplications for memory traffic: 0.5 to 0.8 of a plain convolution's time on an AMD EPYC. Processors
    with AMX multiply twice as fast per core at a similar bandwidth, and are left to PyTorch. The rule depends on the
    processor's features and not on a measurement, so that the same hardware always gives the same bytes.
    """
    return not has_amx()


class WeightCache(NamedTuple):
    """Transformed weights, with the address and version of the weights that they were made from."""

    transformed: Tensor
    address: int
    version: int


class WinogradConv2d(nn.Conv2d):
    """A padded 3x3 convolution that uses `winograd_convolution` on large maps in float32 if no gradient is recorded.

    The transformed weights take four times the memory of the weights. They are computed at the first use and after
    every change of the weights.
    """

    _cache: WeightCache | None = None

    @staticmethod
    def can_replace(conv: nn.Conv2d) -> bool:
        """Return whether a layer is a wide, padded 3x3 convolution without stride."""
        shape = conv.kernel_size, conv.stride, conv.padding, conv.bias is not None
        return shape == ((3, 3), (1, 1), (1, 1), True) and min(conv.weight.shape[:2]) >= MIN_CHANNELS

    def forward(self, x: Tensor) -> Tensor:
        if not self._should_use_winograd(x):
            return super().forward(x)
        assert self.bias is not None
        return winograd_convolution(x, self._transformed_weight(), self.bias)

    def _should_use_winograd(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return False
        height, width = x.shape[-2:]
        if min(height, width) < MIN_SIDE or height % 4 or width % 4:
            return False
        if not x.dtype == self.weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        if torch.is_grad_enabled() or self.weight.requires_grad or self.weight.is_inference():
            return False  # changes of inference tensors are not counted, so their transforms cannot be cached
        return x.device.type in ("cpu", "meta")

    def _transformed_weight(self) -> Tensor:
        key = self.weight.data_ptr(), self.weight._version
        if self._cache is None or self._cache[1:] != key:
            self._cache = WeightCache(transform_weight(self.weight), *key)
        return self._cache.transformed


def transform_weight(weight: Tensor) -> Tensor:
    """Compute G w Gᵀ in float64: (O, C, 3, 3) -> (36, O, C), in the dtype of `weight`."""
    g = G.to(weight.device)
    return torch.einsum("ia,ocab,jb->ijoc", g, weight.double(), g).to(weight.dtype).flatten(0, 1)


def winograd_convolution(x: Tensor, transformed: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution by Winograd's F(4×4, 3×3) (Lavin & Gray 2016, section 4.3), some rows of tiles at a time.

    An output tile of 4x4 pixels is Aᵀ [(G w Gᵀ) ⊙ (Bᵀ d B)] A of its 6x6 pixels of input d: 36 products instead of
    144. Summed over channels, each of the 36 is a matrix product over all tiles.

    Args:
        x: (B, C, H, W) in channels_last; both sides are multiples of 4.
        transformed: (36, O, C), from `transform_weight`.
        bias: (O,).

    Returns:
        (B, O, H, W) in channels_last, within 1e-5 of the largest value of a plain convolution in float32.
    """
    (_, channels, height, width), out_channels = x.shape, len(bias)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    out = x.new_empty(len(x), height, width, out_channels)
    rows = 4 * max(1, STRIP // (36 * (width // 4) * (channels + out_channels)))
    for image, out_image in zip(padded, out, strict=True):
        for top in range(0, height, rows):
            _convolve_strip(image[top : top + rows + 2], transformed, out_image[top : top + rows])
    return out.add_(bias).permute(0, 3, 1, 2)


def _convolve_strip(x: Tensor, transformed: Tensor, out: Tensor) -> None:
    """Convolve n rows of tiles, without the bias: (4n + 2, W + 2, C) -> `out` (4n, W, O)."""
    n, w, channels = len(out) // 4, out.shape[1] // 4, x.shape[-1]
    rows = x.new_empty(6, n, 4 * w + 2, channels)  # Bᵀ d, by row of the tile
    _input_transform([x[i : i + 4 * n - 3 : 4] for i in range(6)], rows)
    tiles = x.new_empty(6, 6, n, w, channels)  # (Bᵀ d) B, by column and row of the tile
    _input_transform([rows[:, :, j : j + 4 * w - 3 : 4] for j in range(6)], tiles)
    columns = x.new_empty(6, 4, n, w, out.shape[-1])
    for j in range(6):
        _output_transform([F.linear(tiles[j, i], transformed[6 * i + j]) for i in range(6)], columns[j])
    _output_transform(list(columns), out.view(n, 4, w, 4, -1).permute(3, 1, 0, 2, 4))


def _input_transform(d: Sequence[Tensor], out: Tensor) -> None:
    """Compute Bᵀ d: six tensors -> `out`, six of the same shape."""
    torch.add(d[4], d[2], alpha=-5, out=out[0]).add_(d[0], alpha=4)
    even, odd = torch.add(d[4], d[2], alpha=-4), torch.add(d[3], d[1], alpha=-4)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.sub(d[4], d[2], out=even)
    torch.sub(d[3], d[1], out=odd)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
    torch.add(d[5], d[3], alpha=-5, out=out[5]).add_(d[1], alpha=4)


def _output_transform(y: Sequence[Tensor], out: Tensor) -> None:
    """Compute Aᵀ y: six tensors -> `out`, four of the same shape."""
    inner, outer = torch.add(y[1], y[2]), torch.add(y[3], y[4])
    torch.add(inner, outer, out=out[0]).add_(y[0])
    torch.add(inner, outer, alpha=4, out=out[2])
    torch.sub(y[1], y[2], out=inner)
    torch.sub(y[3], y[4], out=outer)
    torch.add(inner, outer, alpha=2, out=out[1])
    torch.add(inner, outer, alpha=8, out=out[3]).add_(y[5])
