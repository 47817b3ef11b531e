"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017), in float64."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS_AT_ONCE = 1000
"""Features in float64: 16 MB of 2,048 numbers."""
BLOCK = 256
"""Rows or columns of a matrix product at a time; of 2,048, nine sixteenths are then computed."""


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
    sums = CovarianceAccumulator()
    for rows in features.split(ROWS_AT_ONCE):
        sums.add(rows)
    return sums.statistics()


class CovarianceAccumulator:
    """Mean and covariance of features that come in parts; float64, from the first part's mean to keep the digits."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self.count = 0
        self._near: Tensor
        self._total: Tensor
        self._products: Tensor
        self._off: Tensor  # kept: new memory for every part takes as long as the sums

    def add(self, features: Tensor) -> None:
        """Add (n, D) features."""
        if self.count == 0:
            self._near = features.mean(dim=0, dtype=torch.float64)
            self._total = torch.zeros_like(self._near)
            self._products = self._near.new_zeros(len(self._near), len(self._near))
            self._off = self._near.new_empty(0)
        off = torch.sub(features, self._near, out=self._off.resize_(features.shape))
        self._total += off.sum(dim=0)
        for rows in _blocks(len(self._near)):  # the upper triangle; the lower one mirrors it
            self._products[rows, rows.start :].addmm_(off[:, rows].T, off[:, rows.start :])
        self.count += len(features)

    def statistics(self) -> Statistics:
        """Of all that was added, at least 2."""
        for rows in _blocks(len(self._near)):
            self._products[rows.stop :, rows] = self._products[rows, rows.stop :].T
        mean = self._total / self.count
        covariance = self._products.addr(mean, mean, alpha=-self.count).div_(self.count - 1)
        return Statistics(mean=self._near + mean, covariance=covariance, num_samples=self.count)


class FrechetReference:
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
        # NumPy's is as fast as torch's, and the first call of torch's takes a second
        eigenvalues = torch.from_numpy(np.linalg.eigvalsh(_seen_from(self._root, other.covariance).numpy()))
        shared = _without_rounding(eigenvalues).sqrt().sum()
        distance = (mean - other.mean).square().sum() + covariance.trace() + other.covariance.trace() - 2 * shared
        return max(0.0, float(distance))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Distance between two Gaussians; see `FrechetReference`."""
    return FrechetReference(a)(b)


def _root(covariance: Tensor) -> Tensor:
    """Lower triangular R with R Rᵀ = C: Cholesky's factor; where C is singular, by its eigenvalues. (D, D)."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return factor
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    root = vectors * _without_rounding(eigenvalues).sqrt()
    return torch.linalg.qr(root.T).R.T


def _seen_from(root: Tensor, covariance: Tensor) -> Tensor:
    """Rᵀ C R, the lower triangle, for lower triangular R; products with its zeros are left out: (D, D), (D, D)."""
    result = torch.empty_like(covariance)
    for columns in _blocks(len(root)):
        result[:, columns] = covariance[:, columns.start :] @ root[columns.start :, columns]
    for rows in _blocks(len(root)):  # of C R, rows above these are no longer needed
        result[rows, : rows.stop] = root[rows.start :, rows].T @ result[rows.start :, : rows.stop]
    return result


def _blocks(width: int) -> list[slice]:
    """Columns of triangular and symmetric matrices, of which half need not be computed."""
    return [slice(start, min(start + BLOCK, width)) for start in range(0, width, BLOCK)]


def _without_rounding(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues that are rounding of 0 as 0: their roots, many and of one sign, would add up."""
    floor = eigenvalues.max().clamp(min=0) * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return torch.where(eigenvalues > floor, eigenvalues, 0.0)
