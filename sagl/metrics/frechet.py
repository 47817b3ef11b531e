"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017), in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and covariance of features."""

    mean: Tensor
    """(D,) float64."""
    covariance: Tensor
    """(D, D) float64, divided by N - 1."""
    num_samples: int
    """N."""


def statistics(features: Tensor) -> Statistics:
    """(N, D) -> mean and unbiased covariance, in float64. N is at least 2."""
    features = features.double()
    return Statistics(mean=features.mean(dim=0), covariance=torch.cov(features.T), num_samples=len(features))


class FrechetTo:
    """Distances to one Gaussian, whose root is taken once."""

    def __init__(self, reference: Statistics) -> None:
        """The Gaussian that others are compared with."""
        self.reference, self._root = reference, _root(reference.covariance)

    def __call__(self, other: Statistics) -> float:
        """|mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), at least 0.

        The eigenvalues of C_a C_b are those of the symmetric Rᵀ C_b R with R Rᵀ = C_a, whose roots are taken: no root
        of a matrix that is not symmetric, and singular covariances (fewer samples than features) do no harm.
        """
        mean, covariance = self.reference.mean, self.reference.covariance
        shared = _without_rounding(torch.linalg.eigvalsh(self._root.T @ other.covariance @ self._root)).sqrt().sum()
        distance = (mean - other.mean).square().sum() + covariance.trace() + other.covariance.trace() - 2 * shared
        return max(0.0, float(distance))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Distance between two Gaussians; see `FrechetTo`."""
    return FrechetTo(a)(b)


def _root(covariance: Tensor) -> Tensor:
    """A factor R with R Rᵀ = C, whose eigenvalues with another covariance are those of the symmetric root: (D, D).

    Cholesky's where C has full rank, in a tenth of the time; else by eigenvalues.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return factor
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return vectors * _without_rounding(eigenvalues).sqrt()


def _without_rounding(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues that are rounding of 0 as 0: their roots, many and of one sign, would add up."""
    floor = eigenvalues.max().clamp(min=0) * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return torch.where(eigenvalues > floor, eigenvalues, 0.0)
