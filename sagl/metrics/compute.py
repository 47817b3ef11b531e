"""All numbers of one set of images, by the names that the literature gives them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sagl.errors import require
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.bootstrap import interval
from sagl.metrics.checks import require_comparable
from sagl.metrics.frechet import FrechetReference, statistics
from sagl.metrics.inception_score import inception_score, inception_score_in_chunks
from sagl.metrics.kid import kernel_distance
from sagl.metrics.precision_recall import precision_recall
from sagl.settings.evaluation import MetricSettings


@dataclass(frozen=True, kw_only=True)
class MetricResults:
    """What was measured."""

    values: Mapping[str, float]
    """fid, sfid, kid of the Inception features, fd, sfd, kd of others; is, is_all, precision, recall."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Low and high end, of those that have one."""
    deviations: Mapping[str, float] = field(default_factory=dict)
    """Over subsets, of the kernel distance."""


def compute_metrics(
    made: FeatureStatistics, real: FeatureStatistics, s: MetricSettings, *, inception: bool = False
) -> MetricResults:
    """Measure one set from another, by all that both hold.

    Args:
        made: the images; with all their features.
        real: the reference; a statistics file may hold no features.
        s: of the metrics.
        inception: whether numbers may carry the names that belong to Inception's features.

    Returns:
        fid or fd; with spatial features sfid or sfd; with logits is, the mean over consecutive chunks of 5,000, and
        is_all, over all at once; with features of both sides precision, recall and kid or kd.

    Raises:
        UserError: features that are not finite, too few samples, or of different widths.
    """
    require_comparable(made, real, s.neighbours)
    fid, sfid, kid = ("fid", "sfid", "kid") if inception else ("fd", "sfd", "kd")
    distance = FrechetReference(real.pooled)
    values, intervals, deviations = {fid: distance(made.pooled)}, {}, {}
    if made.spatial is not None and real.spatial is not None:
        values[sfid] = FrechetReference(real.spatial)(made.spatial)
    if made.logits is not None:
        values |= {"is": inception_score_in_chunks(made.logits), "is_all": inception_score(made.logits)}
    if made.features is not None and real.features is not None:
        shares = precision_recall(made.features, real.features, neighbours=s.neighbours)
        values |= {"precision": shares.precision, "recall": shares.recall}
        kernel = kernel_distance(
            made.features, real.features, subsets=s.kid_subsets, size=s.kid_subset_size, seed=s.seed
        )
        values[kid], deviations[kid] = kernel.mean, kernel.deviation
    if made.features is not None and s.bootstrap:
        measure: Callable[..., float] = lambda rows: distance(statistics(rows))  # noqa: E731
        low, high = interval(made.features, measure, draws=s.bootstrap, seed=s.seed)[1:]
        intervals[fid] = (low, high)
    for name, value in values.items():
        require(
            math.isfinite(value),
            f"`extractor` must give features and logits that make finite numbers, and {name} comes out as {value}: it "
            "overflows, or its weights are damaged.",
        )
    return MetricResults(values=values, intervals=intervals, deviations=deviations)
