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
    generator = torch.Generator().manual_seed(seed)
    estimate, values = metric(features), torch.empty(num_resamples, dtype=torch.float64)
    for k in range(num_resamples):
        values[k] = metric(features[torch.randint(len(features), (len(features),), generator=generator)])
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
    generator = torch.Generator().manual_seed(seed)
    differences = torch.empty(num_resamples, dtype=torch.float64)
    for k in range(num_resamples):
        rows = torch.randint(len(first), (len(first),), generator=generator)
        differences[k] = metric(second[rows]) - metric(first[rows])
    return Interval(metric(second) - metric(first), *_quantiles(differences))


def _quantiles(values: Tensor) -> tuple[float, float]:
    tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = torch.quantile(values, tails)
    return float(low), float(high)
