"""Kernel distance of features (KID; Bińkowski et al. 2018): unbiased MMD² with a polynomial kernel."""

from typing import NamedTuple

import torch
from torch import Tensor

SUBSETS, SUBSET_SIZE = 100, 1000
"""Of the public evaluators."""


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets."""

    mean: float
    deviation: float


def kernel_distance(
    made: Tensor, real: Tensor, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> KernelDistance:
    """Over random subsets without replacement: (N, D), (M, D) features -> mean, standard deviation.

    Args:
        made: features of generated images.
        real: of real ones.
        subsets: drawn from each.
        size: of a subset, or as many as the smaller set has.
        seed: of the draws.
    """
    size = min(size, len(made), len(real))
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(subsets, dtype=torch.float64)
    for k in range(subsets):
        some = (torch.randperm(len(of), generator=generator)[:size] for of in (made, real))
        values[k] = squared_mmd(*(of[rows] for of, rows in zip((made, real), some, strict=True)))
    return KernelDistance(mean=float(values.mean()), deviation=float(values.std(correction=0)))


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """The unbiased estimate: (N, D), (M, D) -> a number around 0 for equal distributions, negative ones included."""
    a, b = a.double(), b.double()
    return _mean_of_others(a) + _mean_of_others(b) - 2 * float(_kernel(a, b).mean())


def _mean_of_others(a: Tensor) -> float:
    kernel = _kernel(a, a)
    return float((kernel.sum() - kernel.trace()) / (len(a) * (len(a) - 1)))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """(x · y / D + 1)³: (N, D), (M, D) -> (N, M)."""
    return (a @ b.T / a.shape[1] + 1) ** 3
