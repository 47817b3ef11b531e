"""What 50,000 images of 256x256 will take on 1 to 64 GPUs: a prediction from operations, memory and balance.

    python benchmarks/scaling.py [--share 0.4] [--steps 250] [--passes 2]

Counted: the operations of one forward. Known: the makers' peaks. Assumed: the share of the peak that is reached, and
prices; both are flags.
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
    """A kind of GPU, as its maker and a market describe it."""

    name: str
    tflops: float
    """Dense 16-bit tensor operations with float32 sums, 10^12 a second."""
    gigabytes: int
    dollars_an_hour: float
    """Assumed."""


GPUS = (
    GPU(name="RTX 3090", tflops=71, gigabytes=24, dollars_an_hour=0.3),
    GPU(name="A100 80 GB", tflops=312, gigabytes=80, dollars_an_hour=1.5),
    GPU(name="H100 SXM", tflops=989, gigabytes=80, dollars_an_hour=2.5),
)
WORLD_SIZES = (1, 8, 64)


def hours(num_images: int, batch_size: int, world_size: int, flop_an_image: float, flops: float) -> float:
    """Until the last rank ends: batches are whole, so ranks differ by at most one."""
    batches = math.ceil(math.ceil(num_images / batch_size) / world_size)
    return batches * batch_size * flop_an_image / flops / 3600


def rows(a: argparse.Namespace) -> Iterator[str]:
    """The table, line by line."""
    forward = forward_flops(get_unet_settings(a.model)[0], 1)
    flop_an_image = forward * a.steps * a.passes
    yield f"{a.model}: {forward / 1e12:.2f} TFLOP a forward, {a.steps} steps of {a.passes} passes, "
    yield f"{flop_an_image / 1e15:.2f} PFLOP an image; {a.num_images:,} images; {a.share:.0%} of the peak."
    yield ""
    yield "| GPU | GPUs | images/s | hours | GPU hours | dollars |"
    yield "|---|---|---|---|---|---|"
    for gpu in GPUS:
        for world_size in WORLD_SIZES:
            t = hours(a.num_images, a.batch_size, world_size, flop_an_image, gpu.tflops * 1e12 * a.share)
            used = t * world_size
            cells = (gpu.name, world_size, f"{a.num_images / t / 3600:.2f}", f"{t:.1f}", f"{used:.0f}")
            yield f"| {' | '.join(map(str, cells))} | {used * gpu.dollars_an_hour:,.0f} |"


def main() -> None:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="lsun_cat")
    p.add_argument("--num_images", type=int, default=50_000)
    p.add_argument("--batch_size", type=int, default=16, help="images at once on one GPU")
    p.add_argument("--steps", type=int, default=250)
    p.add_argument("--passes", type=int, default=2, help="network evaluations a step: 2 with SAG at every step")
    p.add_argument("--share", type=float, default=0.4, help="of the peak that is reached")
    print("\n".join(rows(p.parse_args())))


if __name__ == "__main__":
    main()
