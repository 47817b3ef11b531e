"""Bootstrap confidence intervals of metrics of features (Efron 1979)."""

from collections.abc import Callable, Iterator
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


def shifted_interval(estimate: float, values: Tensor) -> Interval:
    """Return the interval of an estimate from its values in resamples.

    The Fréchet distance is biased: a resample holds fewer distinct samples and so has a larger distance. The values
    are therefore shifted so that their mean is the estimate.

    Args:
        estimate: the metric of all samples.
        values: (num_resamples,) the metric of each resample.
    """
    tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = torch.quantile(values - values.mean() + estimate, tails)
    return Interval(estimate, float(low), float(high))


def resample(features: Tensor, metric: Callable[[Tensor], float], *, num_resamples: int, seed: int) -> Tensor:
    """Return the metric of resamples of (N, D) features with replacement, (num_resamples,) float64."""
    values = [metric(features[rows]) for rows in resampled_rows(len(features), num_resamples, seed)]
    return torch.tensor(values, dtype=torch.float64)


def resampled_rows(num_rows: int, num_resamples: int, seed: int) -> Iterator[Tensor]:
    """Yield the row numbers (num_rows,) of each resample with replacement.

    They depend on the arguments alone: sets of equal size are resampled in pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_resamples):
        yield torch.randint(num_rows, (num_rows,), generator=generator)


def paired_difference(estimate: float, first: Tensor, second: Tensor) -> Interval:
    """Return the interval of the difference `second - first` of two sets from the values of their resamples.

    It is shifted as that of one set: the bias of the resamples differs between the sets.

    Args:
        estimate: difference of the metric of both sets.
        first: (num_resamples,) values of `resample`.
        second: those of the other set, with the same seed.
    """
    return shifted_interval(estimate, second - first)
