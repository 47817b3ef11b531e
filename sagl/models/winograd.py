"""Convolutions 3×3 in a quarter of the multiplications: Winograd's F(4×4, 3×3) (Lavin & Gray 2016, section 4.3).

An output tile of 4×4 pixels is Aᵀ [(G w Gᵀ) ⊙ (Bᵀ d B)] A of its 6×6 pixels of input d: 36 products where nine times
sixteen stood. Summed over channels, each of the 36 is a 1×1 convolution, which is left to PyTorch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_SIDE, LEAST_WIDTH = 64, 64
"""Pixels and channels from which it is the faster one; measured in `benchmarks/reports/two_cores.md`."""
STRIP = 2**24
"""Numbers held at one time between the transforms: 64 MB in float32."""
G = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64) / 24


class _Kept(NamedTuple):
    """Transformed weights, and of which weights."""

    transformed: Tensor
    address: int
    version: int


class Conv3x3(nn.Conv2d):
    """A padded 3×3 convolution; on a CPU, in float32, large maps go by tiles where no gradient is wanted.

    The transformed weights, four times as many, are kept from the first map on and made anew when the weights change.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, 3, padding=1)
        self._kept: _Kept | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        if self._pays(x):
            assert self.bias is not None
            return convolution(x, self._transformed(), self.bias)
        return super().forward(x)

    def _pays(self, x: Tensor) -> bool:
        large = min(x.shape[-2:]) >= LEAST_SIDE and min(self.weight.shape[:2]) >= LEAST_WIDTH
        whole = x.shape[-1] % 4 == 0 and x.shape[-2] % 4 == 0
        exact = x.dtype == self.weight.dtype == torch.float32 and x.device.type in ("cpu", "meta")
        return large and whole and exact and not (torch.is_grad_enabled() or self._otherwise_computed())

    def _otherwise_computed(self) -> bool:
        """In 16 bits, or as a graph of its own; and weights whose changes are not counted have no copy kept."""
        free = self.weight.requires_grad or self.weight.is_inference()
        return free or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()

    def _transformed(self) -> Tensor:
        address, version = self.weight.data_ptr(), self.weight._version
        if self._kept is None or (address, version) != self._kept[1:]:
            self._kept = _Kept(transform(self.weight), address, version)
        return self._kept.transformed


def transform(weight: Tensor) -> Tensor:
    """G w Gᵀ, computed in float64: (O, C, 3, 3) -> (36, O, C, 1, 1), as `weight`."""
    g = G.to(weight.device)
    return torch.einsum("ia,ocab,jb->ijoc", g, weight.double(), g).to(weight.dtype).flatten(0, 1)[..., None, None]


def convolution(x: Tensor, transformed: Tensor, bias: Tensor) -> Tensor:
    """The convolution with transformed weights, some rows of tiles at a time.

    Args:
        x: (B, C, H, W) in channels_last; both sides are multiples of 4.
        transformed: (36, O, C, 1, 1), of `transform`.
        bias: (O,).

    Returns:
        (B, O, H, W) in channels_last. Within 1e-5 of the largest value of a plain convolution in float32.
    """
    (_, width, height, side), out = x.shape, len(bias)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    made = x.new_empty(len(x), height, side, out)
    rows = max(1, STRIP // (36 * (side // 4) * (width + out)))
    for image, into in zip(padded, made, strict=True):
        for first in range(0, height, 4 * rows):
            strip = image[first : first + 4 * rows + 2]
            _strip(strip, transformed, into[first : first + 4 * rows])
    return made.add_(bias).permute(0, 3, 1, 2)


def _strip(x: Tensor, transformed: Tensor, out: Tensor) -> None:
    """Rows of tiles: (4n + 2, W + 2, C) -> `out` (4n, W, O), without the bias."""
    n, w = len(out) // 4, out.shape[1] // 4
    across = x.new_empty(6, n, 4 * w + 2, x.shape[-1])
    _input_transform([x[i : i + 4 * n - 3 : 4] for i in range(6)], across)
    tiles = x.new_empty(6, 6, n, w, x.shape[-1])  # [column, row] of a tile's 6×6
    _input_transform([across[:, :, j : j + 4 * w - 3 : 4] for j in range(6)], tiles)
    products = [[_product(tiles[j, i], transformed[6 * i + j]) for i in range(6)] for j in range(6)]
    halfway = x.new_empty(6, 4, n, w, out.shape[-1])
    for column, done in zip(products, halfway, strict=True):
        _output_transform(column, done)
    _output_transform(list(halfway), out.view(n, 4, w, 4, -1).permute(3, 1, 0, 2, 4))


def _product(tiles: Tensor, weight: Tensor) -> Tensor:
    """(n, w, C) -> (n, w, O); row by row, so that no sum is split by threads (see `pointwise`)."""
    return F.conv2d(tiles[:, None].permute(0, 3, 1, 2), weight)[:, :, 0].permute(0, 2, 1)


def _input_transform(d: Sequence[Tensor], out: Tensor) -> None:
    """Out = Bᵀ d: six tensors, to six of the same shape."""
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
    """Out = Aᵀ y: six tensors, to four of the same shape."""
    near, far = torch.add(y[1], y[2]), torch.add(y[3], y[4])
    torch.add(near, far, out=out[0]).add_(y[0])
    torch.add(near, far, alpha=4, out=out[2])
    torch.sub(y[1], y[2], out=near)
    torch.sub(y[3], y[4], out=far)
    torch.add(near, far, alpha=2, out=out[1])
    torch.add(near, far, alpha=8, out=out[3]).add_(y[5])
