"""What features must be before anything is computed from them."""

import torch
from torch import Tensor

from sagl.errors import require
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.frechet import Statistics


def require_comparable(made: FeatureStatistics, real: FeatureStatistics, neighbours: int) -> None:
    """Two sets that can be measured from each other.

    Raises:
        UserError: features that are not finite, of different widths, or of fewer samples than `neighbours` asks for.
    """
    for name, looked in (("run", made), ("reference", real)):
        require_finite_features(name, looked.pooled)
        if looked.features is not None:
            _require_count(name, looked.features, neighbours)
    widths = len(made.pooled.mean), len(real.pooled.mean)
    require(
        widths[0] == widths[1],
        f"`reference` must have features as wide as the run's, {widths[0]} numbers, and has {widths[1]}: they are of "
        "another extractor.",
    )


def require_finite_features(name: str, statistics: Statistics) -> None:
    """Any feature that is not finite leaves its mark in the covariance.

    Raises:
        UserError: there is one; calls the argument that the images came by by its name.
    """
    finite = torch.isfinite(statistics.mean).all() and torch.isfinite(statistics.covariance).all()
    require(
        bool(finite),
        f"`{name}` must give finite features, and some of its {statistics.num_samples} images do not: the extractor "
        "overflows, or its weights are damaged.",
    )


def _require_count(name: str, features: Tensor, neighbours: int) -> None:
    require(
        len(features) > neighbours,
        f"`neighbours` must be below the number of samples, and {name} has {len(features)} features kept, got "
        f"{neighbours}.",
    )
