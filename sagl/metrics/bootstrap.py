"""Bootstrap confidence intervals of metrics of features (Efron 1979)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CONFIDENCE = 0.95
"""Confidence level of the intervals."""


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float


def interval(
    features: Tensor, metric: Callable[[Tensor], float], *, num_resamples: int = 200, seed: int = 0
) -> Interval:
    """Return `metric(features)` with its bootstrap interval.

    The Fréchet distance is biased: a resample holds fewer distinct samples and so has a larger distance. The
    resampled values are therefore shifted so that their mean is the estimate.

    Args:
        features: (N, D).
        metric: maps (N, D) features to a number.
        num_resamples: number of resamples of N rows with replacement.
        seed: random seed of the resamples.
    """
    estimate, values = metric(features), resample(features, metric, num_resamples=num_resamples, seed=seed)
    return Interval(estimate, *_quantiles(values - values.mean() + estimate))


def paired_interval(
    first: Tensor, second: Tensor, metric: Callable[[Tensor], float], *, num_resamples: int = 200, seed: int = 0
) -> Interval:
    """Return `metric(second) - metric(first)` with its bootstrap interval; rows are resampled in pairs.

    Args:
        first: (N, D) features; row i belongs to sample i.
        second: (N, D) features of the same samples made in another way.
        metric: maps (N, D) features to a number, such as the Fréchet distance to a reference.
        num_resamples: number of resamples of N pairs with replacement.
        seed: random seed of the resamples.
    """
    values = (resample(features, metric, num_resamples=num_resamples, seed=seed) for features in (first, second))
    return paired_difference(metric(second) - metric(first), *values)


def resample(features: Tensor, metric: Callable[[Tensor], float], *, num_resamples: int, seed: int) -> Tensor:
    """Return the metric of resamples with replacement, (num_resamples,) float64.

    The rows of a resample depend on the seed and the number of rows alone: sets of equal size are resampled in pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randint(len(features), (len(features),), generator=generator) for _ in range(num_resamples))
    return torch.tensor([metric(features[index]) for index in rows], dtype=torch.float64)


def paired_difference(estimate: float, first: Tensor, second: Tensor) -> Interval:
    """Return the interval of the difference `second - first` of two sets from the values of their resamples.

    Args:
        estimate: difference of the metric of both sets.
        first: (num_resamples,) values of `resample`.
        second: those of the other set, with the same seed.
    """
    return Interval(estimate, *_quantiles(second - first))


def _quantiles(values: Tensor) -> tuple[float, float]:
    tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = torch.quantile(values, tails)
    return float(low), float(high)
