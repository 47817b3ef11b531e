"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017), in float64."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS_PER_CHUNK = 1000
"""Features converted to float64 at once: 16 MB for 2,048 dimensions."""
BLOCK = 256
"""Block size of products with symmetric or triangular matrices; for 2,048 columns, 9/16 of the products remain."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and covariance of features."""

    mean: Tensor
    """(D,) float64."""
    covariance: Tensor
    """(D, D) float64, normalised by N - 1."""
    num_samples: int
    """N, or 0 if it is unknown."""


def statistics(features: Tensor) -> Statistics:
    """Compute mean and unbiased covariance in float64: (N, D), N at least 2."""
    accumulator = CovarianceAccumulator()
    for chunk in features.split(ROWS_PER_CHUNK):
        accumulator.add(chunk)
    return accumulator.statistics()


class CovarianceAccumulator:
    """Accumulates mean and covariance in float64; subtracts the first batch's mean to avoid cancellation."""

    def __init__(self) -> None:
        self.count = 0
        self._shift: Tensor
        self._sum: Tensor
        self._products: Tensor
        self._shifted: Tensor  # a buffer: allocating it for every batch takes as long as the sums

    def add(self, features: Tensor) -> None:
        """Add (n, D) features."""
        if self.count == 0:
            self._shift = features.mean(dim=0, dtype=torch.float64)
            self._sum = torch.zeros_like(self._shift)
            self._products = self._shift.new_zeros(len(self._shift), len(self._shift))
            self._shifted = self._shift.new_empty(0)
        x = torch.sub(features, self._shift, out=self._shifted.resize_(features.shape))
        self._sum += x.sum(dim=0)
        for rows in _blocks(len(self._shift)):  # the upper triangle; `statistics` mirrors it
            self._products[rows, rows.start :].addmm_(x[:, rows].T, x[:, rows.start :])
        self.count += len(features)

    def statistics(self) -> Statistics:
        """Return mean and covariance of all features added, at least 2."""
        for rows in _blocks(len(self._shift)):
            self._products[rows.stop :, rows] = self._products[rows, rows.stop :].T
        mean = self._sum / self.count
        covariance = self._products.addr(mean, mean, alpha=-self.count).div_(self.count - 1)
        return Statistics(mean=self._shift + mean, covariance=covariance, num_samples=self.count)


class FrechetReference:
    """Fréchet distances to one Gaussian, whose covariance is factorised once."""

    def __init__(self, reference: Statistics) -> None:
        self.reference, self._factor = reference, _factorize(reference.covariance)

    def __call__(self, other: Statistics) -> float:
        """Compute |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), at least 0.

        C_a C_b has the eigenvalues of the symmetric Rᵀ C_b R with R Rᵀ = C_a. Their roots are summed, so that no root
        of a non-symmetric matrix is taken and singular covariances (fewer samples than features) are no problem.
        """
        mean, covariance = self.reference.mean, self.reference.covariance
        # NumPy's eigvalsh is as fast as torch's, whose first call takes a second
        eigenvalues = torch.from_numpy(np.linalg.eigvalsh(_congruence(self._factor, other.covariance).numpy()))
        trace_root = _zero_small_eigenvalues(eigenvalues).sqrt().sum()
        distance = (mean - other.mean).square().sum() + covariance.trace() + other.covariance.trace() - 2 * trace_root
        return max(0.0, float(distance))

    def of_resamples(self, features: Tensor, resamples: Iterable[Tensor]) -> Tensor:
        """Compute the distances of resamples of features without their covariances.

        With the centered features X of a resample, Rᵀ C_b R is Pᵀ P / (N - 1) for P = X R, and P Pᵀ has the same
        nonzero eigenvalues. All resamples share the products with R, and a row that is drawn w times counts as one row
        times √w, so that the matrices are as small as the number of different rows, or as the rank of R.

        Args:
            features: (N, D).
            resamples: row numbers (N,) of each resample.

        Returns:
            The distance of each resample, as `self(statistics(features[rows]))` gives it, (num_resamples,) float64.
        """
        mean, trace, num_rows = self.reference.mean, self.reference.covariance.trace(), len(features)
        x = features.double() - mean
        projected, squares, distances = x @ self._factor, x.square().sum(dim=1), list[Tensor]()
        for rows in resamples:
            counts = torch.bincount(rows, minlength=num_rows).double()
            shift = counts @ x / num_rows
            other_trace = (counts @ squares - num_rows * shift.square().sum()) / (num_rows - 1)
            p = (projected - counts @ projected / num_rows)[counts > 0] * counts[counts > 0, None].sqrt()
            products = p @ p.T if len(p) < p.shape[1] else p.T @ p
            eigenvalues = torch.from_numpy(np.linalg.eigvalsh(products.numpy())) / (num_rows - 1)
            trace_root = _zero_small_eigenvalues(eigenvalues).sqrt().sum()
            distances.append(shift.square().sum() + trace + other_trace - 2 * trace_root)
        return torch.stack(distances).clamp(min=0) if distances else x.new_zeros(0)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Compute the distance between two Gaussians; see `FrechetReference`."""
    return FrechetReference(a)(b)


def _factorize(covariance: Tensor) -> Tensor:
    """Return R with R Rᵀ = C: the lower triangular Cholesky factor, or (D, rank) by eigenvalues if C is singular."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return factor
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    eigenvalues = _zero_small_eigenvalues(eigenvalues)  # in ascending order
    rank = max(1, int(eigenvalues.count_nonzero()))
    return vectors[:, -rank:] * eigenvalues[-rank:].sqrt()


def _congruence(factor: Tensor, covariance: Tensor) -> Tensor:
    """Return the lower triangle of Rᵀ C R; products with the zeros of a triangular R are skipped."""
    if factor.shape != covariance.shape:
        return factor.T @ covariance @ factor
    result = torch.empty_like(covariance)
    for columns in _blocks(len(factor)):
        result[:, columns] = covariance[:, columns.start :] @ factor[columns.start :, columns]
    for rows in _blocks(len(factor)):  # the rows of C R above these are no longer needed
        result[rows, : rows.stop] = factor[rows.start :, rows].T @ result[rows.start :, : rows.stop]
    return result


def _blocks(width: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, width)) for start in range(0, width, BLOCK)]


def _zero_small_eigenvalues(eigenvalues: Tensor) -> Tensor:
    """Replace eigenvalues within rounding of 0 by 0: the sum of their many roots would be a bias."""
    floor = eigenvalues.max().clamp(min=0) * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return torch.where(eigenvalues > floor, eigenvalues, 0.0)
