"""Settings of an evaluation."""

import os
from dataclasses import dataclass

from sagl.errors import require, require_finite, require_range
from sagl.settings.sampling import ProgressKind

INCEPTION = "inception"
"""The extractor of the numbers in the literature and of published statistics files."""
EXTRACTOR_NAMES = (INCEPTION, "effnet_lite0_64", "effnet_lite0_224", "dinov2")
"""Names of the feature extractors; a number in a name is the size that images are resized to."""
NAMED_SETS = ("fashion_mnist_train", "fashion_mnist_test", "emoji_train", "emoji_test")
"""Splits at 32×32 as for training: of Fashion-MNIST, padded, and of the emoji."""
MAX_RESAMPLES = 1_000_000
DEFAULT_EXTRACTOR = "effnet_lite0_64"


def require_extractor(name: str, argument: str = "extractor") -> None:
    """Check that this is the name of an extractor, or the full name of a function, package.function.

    Raises:
        UserError: it is neither.
    """
    parts = name.split(".")
    require(
        name in EXTRACTOR_NAMES or (len(parts) > 1 and all(part.isidentifier() for part in parts)),
        f"`{argument}` must be one of {', '.join(EXTRACTOR_NAMES)}, or package.function of your own, got {name!r}.",
    )


def require_image_set(name: str, argument: str) -> None:
    """Check that this is a named set of images, a path that exists, or a pattern or URL.

    Raises:
        UserError: it is none of these; names `argument`.
    """
    require(
        name in NAMED_SETS or os.path.exists(name) or any(character in name for character in "*{:"),
        f"`{argument}` must be one of {', '.join(NAMED_SETS)}, a run of sagl sample, an npz file, a folder of images, "
        f"LSUN's LMDB or shards, and {name} does not exist.",
    )


def require_resamples(bootstrap: int) -> None:
    """Raise a `UserError` unless a number of bootstrap resamples is 0, or enough for an interval."""
    require_range("bootstrap", bootstrap, 0, MAX_RESAMPLES)
    require(bootstrap == 0 or bootstrap >= 20, f"`bootstrap` must be 0 (off) or at least 20, got {bootstrap}.")


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """Settings of the metrics that are computed from features."""

    num_neighbors: int = 3
    """k of precision and recall: the radius of a ball is the distance to the k-th nearest neighbour."""
    max_features: int = 10_000
    """Maximum number of reference features, evenly spaced, for precision, recall and KID."""
    kid_subsets: int = 100
    """Number of random subsets of KID; mean and standard deviation over them are reported."""
    kid_subset_size: int = 1000
    """Samples per subset of KID."""
    bootstrap: int = 0
    """Number of bootstrap resamples for a 95 % interval of the Fréchet distance; 0 is off, 200 is usual."""
    seed: int = 0
    """Random seed of KID subsets and bootstrap resamples."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name, low in (("num_neighbors", 1), ("max_features", 2), ("kid_subsets", 1), ("kid_subset_size", 2)):
            require(getattr(self, name) >= low, f"`{name}` must be at least {low}, got {getattr(self, name)}.")
        require_range("kid_subsets", self.kid_subsets, 0, MAX_RESAMPLES)
        require_resamples(self.bootstrap)
        require(0 <= self.seed < 2**32, f"`seed` must be in 0 … 2³² - 1, got {self.seed}.")


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """Settings of the extraction of features."""

    extractor: str | None = None
    """Feature extractor: inception, effnet_lite0_64, effnet_lite0_224, dinov2, or package.function of your own;
    default: that of a statistics file, else effnet_lite0_64."""
    image_size: int | None = None
    """Size in pixels of the square that images of a folder are cropped and resized to; default: original size."""
    batch_size: int = 100
    """Images per batch and process."""
    progress: ProgressKind = "auto"
    """Progress on the error stream; auto: a bar on a terminal, else lines."""

    def __post_init__(self) -> None:
        if self.extractor is not None:
            require_extractor(self.extractor)
        for name in ("batch_size", "image_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"`{name}` must be at least 1, got {value}.")
