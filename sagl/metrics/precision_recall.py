"""Improved precision and recall (Kynkäänniemi et al. 2019) from features."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NUM_NEIGHBORS = 3
"""Value of k in the paper, and in the tables of the ADM and SAG papers."""
DISTANCES_PER_CHUNK = 2**24
"""Number of float32 distances held at once: 64 MB."""
PAIRS_PER_CHUNK = 2**11
"""Number of pairs whose distance is computed in float64 at once: 34 MB for 2,048 dimensions."""
SPARE = 4
"""Neighbours beyond the k-th whose distances are computed exactly, so that rounding seldom changes the order."""


class PrecisionRecall(NamedTuple):
    """Precision and recall, both in [0, 1]."""

    precision: float
    """Fraction of the generated samples inside the manifold of the real samples."""
    recall: float
    """Fraction of the real samples inside the manifold of the generated samples."""


def precision_recall(
    fake: Tensor, real: Tensor, *, num_neighbors: int = NUM_NEIGHBORS, real_radii: Tensor | None = None
) -> PrecisionRecall:
    """Compute precision and recall: (N, D), (M, D) float32 features, N and M above `num_neighbors`.

    `real_radii` may be the `knn_radii` of the real features, for several sets of samples.

    The manifold of a set is the union of balls around its samples, each with the distance to the sample's k-th nearest
    neighbour as its radius. The result is that of float64 distances: float32 decides only where its error bound
    allows. The public ADM evaluator uses float16 where it fits and may differ in the third decimal.
    """
    fake_radii = knn_radii(fake, num_neighbors)
    real_radii = knn_radii(real, num_neighbors) if real_radii is None else real_radii
    center = real.mean(dim=0)
    fake_covered, real_covered = (torch.zeros(len(points), dtype=torch.bool) for points in (fake, real))
    for rows, approx, error in _distances(fake - center, real - center):
        points, radii = fake[rows], fake_radii[rows]
        _mark_covered(fake_covered[rows], approx - real_radii.to(approx.dtype), error, points, real, real_radii)
        margin = approx.sub_(radii[:, None].to(approx.dtype)).T
        _mark_covered(real_covered, margin, error.T, real, points, radii)
    return PrecisionRecall(*(float(covered.double().mean()) for covered in (fake_covered, real_covered)))


def _mark_covered(
    covered: Tensor, margin: Tensor, error: Tensor, points: Tensor, centers: Tensor, radii: Tensor
) -> None:
    """Mark the points that lie in at least one ball, surface included.

    Args:
        covered: (n,) bool, changed in place.
        margin: (n, m) approximate squared distances to the centers minus squared radii.
        error: (n, 1) or (1, m) error bound of `margin`; within it, the distance is computed exactly.
        points: (n, D).
        centers: (m, D).
        radii: (m,) squared radii, float64.
    """
    covered |= (margin < -error).any(dim=1)
    for pairs in (margin.abs() <= error).nonzero().split(PAIRS_PER_CHUNK):
        point, center = pairs[~covered[pairs[:, 0]]].T
        inside = _exact(points[point], centers[center]) <= radii[center]
        covered[point[inside]] = True


def knn_radii(features: Tensor, num_neighbors: int = NUM_NEIGHBORS) -> Tensor:
    """Compute the squared distance of each sample to its k-th nearest neighbour: (N, D) -> (N,) float64."""
    result, centered = [], features - features.mean(dim=0)
    for rows, approx, error in _distances(centered, centered):
        radii, excluded = _kth_distance(features[rows], features, approx, num_neighbors)
        uncertain = ((radii > 0) & (excluded - error[:, 0] < radii)).nonzero()[:, 0]  # an excluded one may be nearer
        if len(uncertain):
            points = features[rows][uncertain]
            exact = _distances(centered[rows][uncertain].double(), centered.double())
            radii[uncertain] = torch.cat(
                [_kth_distance(points[part], features, d, num_neighbors)[0] for part, d, _ in exact]
            )
        result.append(radii)
    return torch.cat(result)


def _kth_distance(points: Tensor, centers: Tensor, approx: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute the k-th smallest squared distance to the other samples.

    Args:
        points: (n, D), each one of the centers.
        centers: (N, D).
        approx: (n, N) approximate squared distances.
        k: number of the neighbour.

    Returns:
        (n,) float64, exact if the k nearest are among the candidates chosen by `approx`; (n,) the smallest `approx`
        of the centers that are no candidates.
    """
    nearest = approx.topk(min(k + 1 + SPARE, len(centers)), dim=1, largest=False)
    exact = torch.stack([_exact(points, centers[column]) for column in nearest.indices.T], dim=1)
    all_candidates = nearest.values.shape[1] == len(centers)
    excluded = torch.full((len(points),), math.inf) if all_candidates else nearest.values[:, -1]
    return exact.kthvalue(k + 1, dim=1).values, excluded  # one of them is the point itself, at 0


def _distances(points: Tensor, centers: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Compute squared distances by matrix products, a chunk of rows at a time.

    The error bound is 2 (D + 16) machine epsilons of both squared lengths: a sum of D products in any order has an
    error of at most D / 2 epsilons of the product of the lengths (Higham 2002, section 3.1), once for each length and
    twice for the scalar product; the rest is for the centering and the last additions.

    Args:
        points: (N, D), centered, so that lengths are small.
        centers: (M, D), centered at the same point.

    Yields:
        rows; (n, M) squared distances in the dtype of the points; (n, 1) error bounds.
    """
    squares = centers.square().sum(dim=1)
    rounding = 2 * (points.shape[1] + 16) * torch.finfo(points.dtype).eps
    num_rows = max(1, DISTANCES_PER_CHUNK // len(centers))
    for start in range(0, len(points), num_rows):
        rows = slice(start, start + num_rows)
        lengths = points[rows].square().sum(dim=1, keepdim=True)
        approx = torch.addmm(squares, points[rows], centers.T, alpha=-2).add_(lengths)
        yield rows, approx, rounding * (lengths + squares.max())


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """Compute squared distances of pairs in float64: (n, D), (n, D) -> (n,)."""
    return (a.double() - b.double()).square().sum(dim=1)
