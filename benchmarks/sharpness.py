"""Sharpness of guided images relative to unguided ones of the same ids.

    sagl sample --sag.scale 0.3 --sampler ddim --respacing ddim25 --num_samples 200 --compare --output compared
    python benchmarks/sharpness.py compared

Prints the changes of two means over images, with paired 95 % intervals: of the energy above a Gaussian blur, the mean
square of x - blur(x), and of the total variation, the mean of |dx| + |dy|.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from sagl.errors import require
from sagl.metrics.bootstrap import paired_difference, resample
from sagl.sampling.run_folder import SAMPLES, decode_png, iter_samples
from sagl.shapes import Image
from sagl.utils.images import to_float

UNGUIDED = "unguided"


def fine_energy(images: Image, sigma: float) -> Tensor:
    """Return the energy above a Gaussian blur, mean((x - blur(x))²): (N, C, H, W) -> (N,)."""
    size = min(2 * math.ceil(3 * sigma) + 1, 2 * images.shape[-1] - 1)
    return (images - gaussian_blur(images, [size, size], [sigma, sigma])).square().mean(dim=(1, 2, 3))


def total_variation(images: Image) -> Tensor:
    """Return the anisotropic total variation, mean |dx| + mean |dy|: (N, C, H, W) -> (N,)."""
    return sum(images.diff(dim=dim).abs().mean(dim=(1, 2, 3)) for dim in (2, 3))  # type: ignore[return-value]


def read_pairs(run: Path) -> tuple[Image, Image]:
    """Return the unguided and the guided images of a run that was sampled with `compare`, (N, 3, H, W) in [-1, 1]."""
    samples = list(iter_samples(run))
    require(
        all(UNGUIDED in sample.pngs for sample in samples), f"`run` must be sampled with `compare`, and {run} is not."
    )

    def images(row: str) -> Image:
        pixels = np.stack([decode_png(sample.pngs[row]) for sample in samples])
        return to_float(torch.from_numpy(pixels).permute(0, 3, 1, 2))

    return images(UNGUIDED), images(SAMPLES)


def relative_change(measure: Callable[[Image], Tensor], unguided: Image, guided: Image) -> str:
    """Return the change of a measure's mean over images, relative to the unguided images, with its 95 % interval."""
    before, after = measure(unguided), measure(guided)
    values = (resample(part, lambda rows: float(rows.mean()), num_resamples=2000, seed=0) for part in (before, after))
    change = paired_difference(float(after.mean() - before.mean()), *values)
    return "{:+.1%} ({:+.1%} … {:+.1%})".format(*(value / float(before.mean()) for value in change))


def main() -> None:
    """Print both changes."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path)
    p.add_argument("--sigma", type=float, default=1.5, help="standard deviation of the blur in pixels")
    a = p.parse_args()
    unguided, guided = read_pairs(a.run)
    print(f"{len(guided)} images, guided minus unguided:")
    print(f"energy above sigma {a.sigma}: {relative_change(lambda x: fine_energy(x, a.sigma), unguided, guided)}")
    print(f"total variation: {relative_change(total_variation, unguided, guided)}")


if __name__ == "__main__":
    main()
