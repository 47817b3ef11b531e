"""Improved precision and recall of generated images (Kynkäänniemi et al. 2019), from their features."""

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
"""Neighbours beyond the k-th that are measured exactly, so that rounding cannot take one for another."""
ROUNDING = 1e-5
"""Of squared distances in float32, of the squared lengths behind them, from a common middle; nearer to a radius they
are measured exactly."""


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
    longest = near_real.square().sum(dim=1).max()
    among_real, among_made = (torch.zeros(len(points), dtype=torch.bool) for points in (made, real))
    for rows, near in _distances(near_made, near_real):
        slack = ROUNDING * (near_made[rows].square().sum(dim=1, keepdim=True) + longest)
        points, reach = made[rows], reach_made[rows]
        _cover(among_real[rows], near - reach_real.to(near.dtype), slack, points, real, reach_real)
        margin = near.sub_(reach[:, None].to(near.dtype)).T
        _cover(among_made, margin, slack.T, real, points, reach)
    return PrecisionRecall(*(float(inside.double().mean()) for inside in (among_real, among_made)))


def _cover(inside: Tensor, margin: Tensor, slack: Tensor, points: Tensor, centres: Tensor, reach: Tensor) -> None:
    """Mark the points in at least one ball, surface included.

    Args:
        inside: (n,) bool, to mark.
        margin: (n, m) squared distances from the centres, less their balls' squared radii.
        slack: by how much these may be wrong.
        points: (n, D).
        centres: (m, D).
        reach: (m,) squared radii, float64.
    """
    inside |= (margin < -slack).any(dim=1)
    doubtful = (margin.abs() <= slack).nonzero()
    doubtful = doubtful[~inside[doubtful[:, 0]]]
    for sample, centre in (part.T for part in doubtful.split(PAIRS_AT_ONCE)):
        held = _exact(points[sample], centres[centre]) <= reach[centre]
        inside[sample[held]] = True


def radii(features: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Squared distance of each sample from its k-th nearest other one: (N, D) -> (N,) float64."""
    wanted = min(neighbours + 1 + SPARE, len(features))
    found, centred = [], features - features.mean(dim=0)
    for rows, near in _distances(centred, centred):
        nearest = near.topk(wanted, dim=1, largest=False).indices  # one of them is the sample itself, at 0
        exact = torch.stack([_exact(features[rows], features[column]) for column in nearest.T], dim=1)
        found.append(exact.kthvalue(neighbours + 1, dim=1).values)
    return torch.cat(found)


def _distances(points: Tensor, centres: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances, some rows at a time: (N, D), (M, D) -> (rows, (n, M) float32), to `ROUNDING`."""
    squares = centres.square().sum(dim=1)
    at_once = max(1, DISTANCES_AT_ONCE // len(centres))
    for start in range(0, len(points), at_once):
        rows = slice(start, start + at_once)
        lengths = points[rows].square().sum(dim=1, keepdim=True)
        yield rows, torch.addmm(squares, points[rows], centres.T, alpha=-2).add_(lengths)


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of pairs in float64: (n, D), (n, D) -> (n,)."""
    return (a.double() - b.double()).square().sum(dim=1)
