"""Peak throughput of 3x3 convolutions on this machine, and the number of operations of a forward pass."""

import time

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sagl.models.adm import UNet
from sagl.settings.network import UNetSettings
from sagl.utils.environment import disable_malloc_trim

SHAPES = ((1, 256, 256), (1, 512, 128), (1, 512, 64), (4, 512, 64), (4, 1024, 32))
"""(batch, channels, side) of convolutions in ADM's networks."""


def convolution_peaks(precision: str, repeats: int = 5) -> float:
    """Return the FLOP/s of the fastest 3x3 convolution in channels_last."""
    disable_malloc_trim()
    return max(_convolution_rate(*shape, getattr(torch, precision), repeats) for shape in SHAPES)


def _convolution_rate(batch: int, channels: int, side: int, dtype: torch.dtype, repeats: int) -> float:
    layout = torch.channels_last
    x = torch.randn(batch, channels, side, side, dtype=dtype).to(memory_format=layout)
    weight = torch.randn(channels, channels, 3, 3, dtype=dtype).to(memory_format=layout)
    flops, best = 2 * 9 * channels**2 * batch * side**2, float("inf")
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            best = min(best, time.perf_counter() - start)
    return flops / best


def forward_flops(s: UNetSettings, batch_size: int) -> int:
    """Count the FLOP of convolutions and matrix products in one forward pass, on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network = UNet(s).eval()
        labels = None if s.num_classes is None else torch.zeros(batch_size, dtype=torch.long)
        network(torch.empty(batch_size, s.in_channels, s.image_size, s.image_size), torch.zeros(batch_size), labels)
    return int(counter.get_total_flops())
