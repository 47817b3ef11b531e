"""Bootstrap intervals of what is computed from the features of many samples (Efron 1979)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LEVEL = 0.95
"""Of an interval: so often it holds the number that infinitely many samples would give."""


class Interval(NamedTuple):
    """An estimate, and the ends of its interval."""

    estimate: float
    low: float
    high: float


def interval(features: Tensor, measure: Callable[[Tensor], float], *, draws: int = 200, seed: int = 0) -> Interval:
    """What `measure` says of a set, and how far that would move with other samples.

    A Fréchet distance of fewer different samples is larger, and a draw with replacement holds fewer: the draws are
    moved by their mean's distance from the estimate, which would otherwise lie outside of its own interval.

    Args:
        features: (N, D).
        measure: of features (N, D).
        draws: sets of N samples, drawn with replacement.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    estimate, found = measure(features), torch.empty(draws, dtype=torch.float64)
    for k in range(draws):
        found[k] = measure(features[torch.randint(len(features), (len(features),), generator=generator)])
    low, high = _ends(found - found.mean() + estimate)
    return Interval(estimate, low, high)


def paired_interval(
    first: Tensor, second: Tensor, measure: Callable[[Tensor], float], *, draws: int = 200, seed: int = 0
) -> Interval:
    """By how much `measure` of the second set is above that of the first: samples are drawn in pairs.

    Args:
        first: (N, D) features; row i belongs to sample i.
        second: (N, D), of the same samples made in another way.
        measure: of features (N, D), such as their Fréchet distance to a reference.
        draws: sets of N pairs, drawn with replacement.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    differences = torch.empty(draws, dtype=torch.float64)
    for k in range(draws):
        rows = torch.randint(len(first), (len(first),), generator=generator)
        differences[k] = measure(second[rows]) - measure(first[rows])
    return Interval(measure(second) - measure(first), *_ends(differences))


def _ends(values: Tensor) -> tuple[float, float]:
    """Between which `LEVEL` of them lie."""
    low, high = torch.quantile(values, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    return float(low), float(high)
