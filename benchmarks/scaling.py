"""Predicted time and cost of 50,000 images of 256x256 on 1 to 64 GPUs.

    python benchmarks/scaling.py [--share 0.4] [--steps 250] [--passes 2]

The operations of a forward pass are counted, and the peak throughputs are those of the data sheets. The fraction of the
peak that is reached (`--share`) and the prices are assumptions.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where sagl is not installed

from benchmarks.peak import forward_flops
from sagl.models.zoo import get_unet_settings


@dataclass(frozen=True, kw_only=True)
class GPU:
    """Data of a GPU model."""

    name: str
    tflops: float
    """Peak of dense 16-bit matrix products with float32 accumulation, in TFLOP/s."""
    gigabytes: int
    dollars_per_hour: float
    """Assumed price."""


GPUS = (
    GPU(name="RTX 3090", tflops=71, gigabytes=24, dollars_per_hour=0.3),
    GPU(name="A100 80 GB", tflops=312, gigabytes=80, dollars_per_hour=1.5),
    GPU(name="H100 SXM", tflops=989, gigabytes=80, dollars_per_hour=2.5),
)
WORLD_SIZES = (1, 8, 64)


def hours(num_images: int, batch_size: int, world_size: int, flop_per_image: float, flops: float) -> float:
    """Return the hours until the last rank ends; ranks differ by at most one batch."""
    batches = math.ceil(math.ceil(num_images / batch_size) / world_size)
    return batches * batch_size * flop_per_image / flops / 3600


def rows(a: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the table."""
    forward = forward_flops(get_unet_settings(a.model)[0], 1)
    flop_per_image = forward * a.steps * a.passes
    yield f"{a.model}: {forward / 1e12:.2f} TFLOP per forward pass, {a.steps} steps of {a.passes} passes, "
    yield f"{flop_per_image / 1e15:.2f} PFLOP per image; {a.num_images:,} images; {a.share:.0%} of the peak."
    yield ""
    yield "| GPU | GPUs | images/s | hours | GPU hours | dollars |"
    yield "|---|---|---|---|---|---|"
    for gpu in GPUS:
        for world_size in WORLD_SIZES:
            t = hours(a.num_images, a.batch_size, world_size, flop_per_image, gpu.tflops * 1e12 * a.share)
            used = t * world_size
            cells = (gpu.name, world_size, f"{a.num_images / t / 3600:.2f}", f"{t:.1f}", f"{used:.0f}")
            yield f"| {' | '.join(map(str, cells))} | {used * gpu.dollars_per_hour:,.0f} |"


def main() -> None:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="lsun_cat")
    p.add_argument("--num_images", type=int, default=50_000)
    p.add_argument("--batch_size", type=int, default=16, help="images per batch and GPU")
    p.add_argument("--steps", type=int, default=250)
    p.add_argument("--passes", type=int, default=2, help="network evaluations per step: 2 with SAG at every step")
    p.add_argument("--share", type=float, default=0.4, help="fraction of the peak throughput that is reached")
    print("\n".join(rows(p.parse_args())))


if __name__ == "__main__":
    main()
