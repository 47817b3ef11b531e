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
    low, high = torch.quantile(differences, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    return Interval(measure(second) - measure(first), float(low), float(high))
