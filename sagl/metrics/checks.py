"""Checks of features before metrics are computed from them."""

import torch

from sagl.errors import require
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.frechet import Statistics


def require_comparable(fake: FeatureStatistics, real: FeatureStatistics, num_neighbors: int) -> None:
    """Check that metrics between two sets can be computed.

    Raises:
        UserError: features that are not finite, of different widths, or no more samples than `num_neighbors`.
    """
    for argument, statistics in (("images", fake), ("reference", real)):
        require_finite_features(argument, statistics.pooled)
        if statistics.features is not None:
            require(
                len(statistics.features) > num_neighbors,
                f"`num_neighbors` must be below the number of features, and `{argument}` has "
                f"{len(statistics.features)}, got {num_neighbors}.",
            )
    width, reference_width = len(fake.pooled.mean), len(real.pooled.mean)
    require(
        width == reference_width,
        f"`reference` must have features of {width} dimensions like the images, and it has {reference_width}: they are "
        "of another extractor.",
    )


def require_finite_features(argument: str, statistics: Statistics) -> None:
    """Check that all features were finite; one that is not makes the mean or the covariance not finite.

    Raises:
        UserError: names `argument`, which the images were given for.
    """
    finite = torch.isfinite(statistics.mean).all() and torch.isfinite(statistics.covariance).all()
    require(
        bool(finite),
        f"`{argument}` must give finite features, and some of its {statistics.num_samples} images do not: the "
        "extractor overflows, or its weights are damaged.",
    )
