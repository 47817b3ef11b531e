"""Computation of all metrics between two image sets, and checks of their features."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from sagl.errors import require
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.bootstrap import resampled_rows, shifted_interval
from sagl.metrics.frechet import FrechetReference, Statistics
from sagl.metrics.inception_score import inception_score, inception_score_in_chunks
from sagl.metrics.kid import kernel_distance
from sagl.metrics.precision_recall import precision_recall
from sagl.settings.evaluation import MetricSettings


@dataclass(frozen=True, kw_only=True)
class MetricResults:
    """Values of the metrics by name."""

    values: Mapping[str, float]
    """fid, sfid, kid for Inception features, fd, sfd, kd for others; is, is_all, precision, recall."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Confidence intervals (low, high) of the metrics that have one."""
    resamples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Values of these metrics in each bootstrap resample, for paired differences of two sets."""
    stds: Mapping[str, float] = field(default_factory=dict)
    """Standard deviation of KID over its subsets."""


def compute_metrics(
    fake: FeatureStatistics, real: FeatureStatistics, s: MetricSettings, *, inception: bool = False
) -> MetricResults:
    """Compute all metrics that the statistics of both sets allow.

    Args:
        fake: statistics of the images, with all their features.
        real: statistics of the reference; a statistics file may hold no features.
        s: settings of the metrics.
        inception: whether the features are Inception's, so that fid, sfid and kid are the right names.

    Returns:
        fid or fd; with spatial features sfid or sfd; with logits is, the mean over consecutive chunks of 5,000, and
        is_all, over all images at once; with features of both sets precision, recall and kid or kd, whose standard
        deviation is that over subsets, and is left out if a subset is a whole set.

    Raises:
        UserError: features that are not finite, too few samples, or different widths.
    """
    require_comparable(fake, real, s.num_neighbors)
    fid, sfid, kid = ("fid", "sfid", "kid") if inception else ("fd", "sfd", "kd")
    distance = FrechetReference(real.pooled)
    values, intervals, resamples, stds = {fid: distance(fake.pooled)}, {}, {}, {}
    if fake.spatial is not None and real.spatial is not None:
        values[sfid] = FrechetReference(real.spatial)(fake.spatial)
    if fake.logits is not None:
        values |= {"is": inception_score_in_chunks(fake.logits), "is_all": inception_score(fake.logits)}
    if fake.features is not None and real.features is not None:
        values |= precision_recall(fake.features, real.features, num_neighbors=s.num_neighbors)._asdict()
        values[kid], std = kernel_distance(
            fake.features, real.features, num_subsets=s.kid_subsets, subset_size=s.kid_subset_size, seed=s.seed
        )
        if s.kid_subset_size < min(len(fake.features), len(real.features)):  # else the subsets of a set are equal
            stds[kid] = std
    if fake.features is not None and s.bootstrap:
        rows = resampled_rows(len(fake.features), s.bootstrap, s.seed)
        distances = distance.of_resamples(fake.features, rows)
        bounds = shifted_interval(values[fid], distances)
        intervals[fid], resamples[fid] = (bounds.low, bounds.high), tuple(distances.tolist())
    for name, value in values.items():
        require(
            math.isfinite(value),
            f"`extractor` must give features and logits with finite metrics, and {name} is {value}: it overflows, or "
            "its weights are damaged.",
        )
    return MetricResults(values=values, intervals=intervals, resamples=resamples, stds=stds)


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
