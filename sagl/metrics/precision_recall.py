"""Improved precision and recall of generated images (Kynkäänniemi et al. 2019), from their features."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 3
"""The paper's k, and that of the ADM and SAG papers' tables."""
DISTANCES_AT_ONCE = 2**24
"""64 MB in float32, however many features there are."""
PAIRS_AT_ONCE = 2**11
"""Measured in float64: 34 MB of 2,048 features."""
SPARE = 4
"""Neighbours beyond the k-th that are measured exactly, so that rounding seldom takes one for another."""


class PrecisionRecall(NamedTuple):
    """Two shares of samples, each from 0 to 1."""

    precision: float
    """Of the generated samples, those inside the manifold of the real ones."""
    recall: float
    """Of the real samples, those inside the manifold of the generated ones."""


def precision_recall(made: Tensor, real: Tensor, *, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Both shares: (N, D), (M, D) features, float32 -> precision, recall; N and M are above `neighbours`.

    A set's manifold is the union of balls around its samples, each as far as the sample's k-th nearest other one. The
    same as by all distances in float64. The public ADM evaluator takes squared distances in float16 where they fit,
    and so may differ in the third decimal.
    """
    reach_made, reach_real = radii(made, neighbours), radii(real, neighbours)
    middle = real.mean(dim=0)
    near_made, near_real = made - middle, real - middle
    among_real, among_made = (torch.zeros(len(points), dtype=torch.bool) for points in (made, real))
    for rows, near, wrong in _distances(near_made, near_real):
        points, reach = made[rows], reach_made[rows]
        _cover(among_real[rows], near - reach_real.to(near.dtype), wrong, points, real, reach_real)
        margin = near.sub_(reach[:, None].to(near.dtype)).T
        _cover(among_made, margin, wrong.T, real, points, reach)
    return PrecisionRecall(*(float(inside.double().mean()) for inside in (among_real, among_made)))


def _cover(inside: Tensor, margin: Tensor, wrong: Tensor, points: Tensor, centres: Tensor, reach: Tensor) -> None:
    """Mark the points in at least one ball, surface included.

    Args:
        inside: (n,) bool, to mark.
        margin: (n, m) squared distances from the centres, less their balls' squared radii.
        wrong: by how much these may be, (n, 1) or (1, m); nearer to a surface, distances are taken exactly.
        points: (n, D).
        centres: (m, D).
        reach: (m,) squared radii, float64.
    """
    inside |= (margin < -wrong).any(dim=1)
    for pairs in (margin.abs() <= wrong).nonzero().split(PAIRS_AT_ONCE):
        sample, centre = pairs[~inside[pairs[:, 0]]].T
        held = _exact(points[sample], centres[centre]) <= reach[centre]
        inside[sample[held]] = True


def radii(features: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Squared distance of each sample from its k-th nearest other one: (N, D) -> (N,) float64."""
    result, centred = [], features - features.mean(dim=0)
    for rows, near, wrong in _distances(centred, centred):
        reach, beyond = _kth(features[rows], features, near, neighbours)
        unsure = ((reach > 0) & (beyond - wrong[:, 0] < reach)).nonzero()[:, 0]  # one left out might be nearer
        if len(unsure):
            points = features[rows][unsure]
            again = _distances(centred[rows][unsure].double(), centred.double())
            reach[unsure] = torch.cat([_kth(points[part], features, near, neighbours)[0] for part, near, _ in again])
        result.append(reach)
    return torch.cat(result)


def _kth(points: Tensor, centres: Tensor, near: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """The k-th smallest squared distance but for a point's own.

    Args:
        points: (n, D), each one of the centres.
        centres: (N, D).
        near: (n, N) squared distances as they are known.
        neighbours: k.

    Returns:
        (n,) float64, exact if the nearest few are among the nearest by `near`; and (n,), what the others have there at
        least.
    """
    few = near.topk(min(neighbours + 1 + SPARE, len(centres)), dim=1, largest=False)
    exact = torch.stack([_exact(points, centres[column]) for column in few.indices.T], dim=1)
    beyond = few.values[:, -1] if few.values.shape[1] < len(centres) else torch.full((len(points),), math.inf)
    return exact.kthvalue(neighbours + 1, dim=1).values, beyond  # one of them is the point itself, at 0


def _distances(points: Tensor, centres: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Squared distances by one product, some rows at a time.

    What they may be wrong by is (D + 16) * 2 machine epsilons of both squared lengths: sums of D products in any order
    have an error of at most D / 2 epsilons of the lengths' product (Higham 2002, section 3.1), once in either length
    and twice in the product between them; the rest is for the differences from a middle and the last additions.

    Args:
        points: (N, D), from a common middle, so that lengths are short.
        centres: (M, D).

    Yields:
        rows; (n, M) in the dtype of the points; (n, 1), what these may be wrong by.
    """
    squares = centres.square().sum(dim=1)
    rounding = 2 * (points.shape[1] + 16) * torch.finfo(points.dtype).eps
    at_once = max(1, DISTANCES_AT_ONCE // len(centres))
    for start in range(0, len(points), at_once):
        rows = slice(start, start + at_once)
        lengths = points[rows].square().sum(dim=1, keepdim=True)
        near = torch.addmm(squares, points[rows], centres.T, alpha=-2).add_(lengths)
        yield rows, near, rounding * (lengths + squares.max())


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of pairs in float64: (n, D), (n, D) -> (n,)."""
    return (a.double() - b.double()).square().sum(dim=1)
