"""Kernel inception distance (KID; Bińkowski et al. 2018): unbiased MMD² with a cubic polynomial kernel."""

from typing import NamedTuple

import torch
from torch import Tensor

NUM_SUBSETS, SUBSET_SIZE = 100, 1000
"""Values of the public evaluators."""


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets."""

    mean: float
    std: float


def kernel_distance(
    fake: Tensor, real: Tensor, *, num_subsets: int = NUM_SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> KernelDistance:
    """Compute KID over random subsets drawn without replacement.

    Args:
        fake: (N, D) features of generated images.
        real: (M, D) features of real images.
        num_subsets: number of subsets of each set.
        subset_size: samples per subset, at most N and M.
        seed: random seed of the subsets.
    """
    size = min(subset_size, len(fake), len(real))
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(num_subsets, dtype=torch.float64)
    for k in range(num_subsets):
        a, b = (features[torch.randperm(len(features), generator=generator)[:size]] for features in (fake, real))
        values[k] = squared_mmd(a, b)
    return KernelDistance(mean=float(values.mean()), std=float(values.std(correction=0)))


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """Compute the unbiased estimate of MMD²: (N, D), (M, D) -> a number that may be negative."""
    a, b = a.double(), b.double()
    return _mean_off_diagonal(a) + _mean_off_diagonal(b) - 2 * float(_kernel(a, b).mean())


def _mean_off_diagonal(a: Tensor) -> float:
    kernel = _kernel(a, a)
    return float((kernel.sum() - kernel.trace()) / (len(a) * (len(a) - 1)))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return (x · y / D + 1)³ of all pairs: (N, D), (M, D) -> (N, M)."""
    return (a @ b.T / a.shape[1] + 1) ** 3
