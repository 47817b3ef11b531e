"""Nearest training images of generated images, in pixels and in features, to see whether a network copies.

    sagl sample --num_samples 500 --output samples
    python benchmarks/memorisation.py samples --train fashion_mnist_train --test fashion_mnist_test --output nearest.png

The figure shows generated images; below each the nearest training image in pixels, and the nearest in features. The
table compares distances to the nearest training image with those of test images, which the network has not seen: of a
network that does not copy, half of the images are closer than the median of the test images, and 5 % are closer than
their 5th percentile. More are closer also if the images are simpler than the test images, or of fewer kinds.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from scipy.stats import binomtest
from torch import Tensor

from sagl.evaluation.image_sets import open_image_set
from sagl.metrics.extractors import get_extractor
from sagl.metrics.features import extract_features
from sagl.settings.evaluation import DEFAULT_EXTRACTOR
from sagl.shapes import ImageUint8
from sagl.utils.environment import disable_malloc_trim
from sagl.utils.files import atomic_file
from sagl.utils.images import image_grid, save_png, to_rgb

NUM_SHOWN, COLUMNS = 32, 8
FONT_SIZE, GAP = 14, 8
"""Font size and gap of the captions in pixels."""
ROWS_PER_CHUNK = 100
PERCENTILE = 5


@dataclass(frozen=True, kw_only=True)
class Share:
    """Share of images that are closer to the training images than a bound, with its 95 % Wilson interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} … {self.high:.1%})"


def nearest(points: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Return distance and index of the nearest training point: (N, D), (M, D) -> (N,) float32, (N,) int64."""
    center = train.mean(dim=0)
    indices = torch.cat([torch.cdist(p - center, train - center).argmin(dim=1) for p in points.split(ROWS_PER_CHUNK)])
    return (points - train[indices]).norm(dim=1), indices


def share_below(distances: Tensor, bound: float) -> Share:
    """Return the share of distances below a bound."""
    result = binomtest(int((distances < bound).sum()), len(distances))
    interval = result.proportion_ci(method="wilson")
    return Share(value=float(result.statistic), low=float(interval.low), high=float(interval.high))


def pixels(images_uint8: ImageUint8) -> Tensor:
    """Return pixels in [0, 1]: (N, C, H, W) -> (N, C · H · W)."""
    return images_uint8.float().flatten(1) / 255


def read_images(name: str, count: int | None, argument: str) -> ImageUint8:
    """Return the first images of a set in colour."""
    images = open_image_set(name, argument=argument)
    return to_rgb(images.read(0, len(images) if count is None else min(count, len(images))))


def with_captions(rows: Mapping[str, ImageUint8]) -> ImageUint8:
    """Arrange images in a grid, with the caption of every row at its left: R rows of (N, C, H, W) -> (3, H', W')."""
    grid = image_grid(list(rows.values()), COLUMNS)
    num_rows = len(rows) * math.ceil(len(next(iter(rows.values()))) / COLUMNS)
    font = ImageFont.load_default(FONT_SIZE)
    margin = 2 * GAP + math.ceil(max(map(font.getlength, rows)))
    image = PILImage.new("RGB", (margin + grid.shape[2], grid.shape[1]), "white")
    image.paste(PILImage.fromarray(grid.permute(1, 2, 0).contiguous().numpy()), (margin, 0))
    draw = ImageDraw.Draw(image)
    for k, caption in zip(range(num_rows), cycle(rows), strict=False):
        middle = (k + 0.5) * grid.shape[1] / num_rows
        draw.text((GAP, middle), caption, fill="black", font=font, anchor="lm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def main() -> None:
    """Print the table and write the image."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", help="run of sagl sample, or an npz file")
    p.add_argument("--train", default="fashion_mnist_train", help="training images, as for sagl evaluate")
    p.add_argument("--test", default="fashion_mnist_test", help="images that the network has not seen")
    p.add_argument("--num_train", type=int, default=None, help="number of training images; default: all")
    p.add_argument("--num_test", type=int, default=1000)
    p.add_argument("--extractor", default=DEFAULT_EXTRACTOR)
    p.add_argument("--output", type=Path, default=Path("nearest.png"))
    a = p.parse_args()
    disable_malloc_trim()
    images, train = read_images(a.images, None, "images"), read_images(a.train, a.num_train, "train")
    test, extract = read_images(a.test, a.num_test, "test"), get_extractor(a.extractor)(torch.device("cpu"))
    print(f"{len(images)} images, {len(train)} training images, {len(test)} test images.")
    rows = {"generated": images[:NUM_SHOWN]}
    print("| distance | median | median of test images | closer than that | closer than their 5th percentile |")
    print("|---|---|---|---|---|")
    for name, embed in (("pixels", pixels), (a.extractor, lambda batch: extract_features(batch, extract).pooled)):
        train_points = embed(train)
        (distances, indices), (of_test, _) = (nearest(embed(part), train_points) for part in (images, test))
        bounds = float(of_test.median()), float(of_test.quantile(PERCENTILE / 100))
        shares = " | ".join(str(share_below(distances, bound)) for bound in bounds)
        print(f"| {name} | {float(distances.median()):.2f} | {bounds[0]:.2f} | {shares} |", flush=True)
        rows[f"nearest in {name}"] = train[indices[:NUM_SHOWN]]
    with atomic_file(a.output) as partial:
        save_png(with_captions(rows), partial)


if __name__ == "__main__":
    main()
