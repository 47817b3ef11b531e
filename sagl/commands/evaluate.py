"""`sagl evaluate`: the Fréchet distance of a run's images from a reference."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sagl.commands.parser import Parser
from sagl.machine import keep_freed_memory
from sagl.settings.paths import cache_folder

DATA_SETS = ("fashion_mnist_train", "fashion_mnist_test")

if TYPE_CHECKING:
    from sagl.shapes import ImageUint8


def evaluate_parser() -> Parser:
    """The flags."""
    p = Parser("evaluate", "Fréchet distance of images from a reference.")
    p.add_argument("run", type=str, help="Run folder, npz of images, or fashion_mnist_train / fashion_mnist_test.")
    p.add_argument("--reference", type=str, default="fashion_mnist_test", help="What to measure from; as for the run.")
    extractors = Literal["effnet_lite0_64", "effnet_lite0_224"]
    p.add_argument("--extractor", type=extractors, default="effnet_lite0_64", help="Which features to compare.")
    p.add_argument("--num_samples", type=int, default=None, help="Only so many of the run's images, the first.")
    return p


def main(arguments: list[str]) -> None:
    """Measure: `sagl evaluate RUN [--reference R] [--extractor E] [--num_samples N]`.

    Raises:
        UserError: the images, the data or the extractor are not there, or too few.
    """
    given = evaluate_parser().parse(arguments)
    keep_freed_memory()
    from sagl.metrics.features import EXTRACTORS, features_of
    from sagl.metrics.frechet import frechet_distance, statistics
    from sagl.metrics.reference import cached_statistics
    from sagl.settings.errors import require

    started = time.monotonic()
    images = _images(given.run)
    wanted = len(images) if given.num_samples is None else given.num_samples
    require(2 <= wanted <= len(images), f"`num_samples` must be 2 … {len(images)} for {given.run}, got {wanted}.")
    extract = EXTRACTORS[given.extractor]()
    measured = statistics(features_of(images[:wanted], extract))
    if given.reference in DATA_SETS:
        kept = cache_folder() / "statistics" / f"{given.reference}-{given.extractor}.npz"
        reference = cached_statistics(kept, lambda: features_of(_images(given.reference), extract))
    else:
        others = _images(given.reference)
        require(
            len(others) >= 2, f"`reference` must hold at least 2 images, and {given.reference} holds {len(others)}."
        )
        reference = statistics(features_of(others, extract))
    result = {
        "frechet_distance": round(frechet_distance(measured, reference), 3),
        "extractor": given.extractor,
        "run": given.run,
        "num_samples": wanted,
        "reference": given.reference,
        "num_reference": reference.num_samples,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result))


def _images(source: str) -> "ImageUint8":
    from sagl.data.fashion_mnist import PaddedFashionMNIST, fetch
    from sagl.data.views import read_samples

    if source not in DATA_SETS:
        return read_samples(Path(source))
    fetch(cache_folder())
    return PaddedFashionMNIST(cache_folder(), train=source.endswith("train")).images
