"""Improved precision and recall of generated images (Kynkäänniemi et al. 2019), from their features."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 3
"""The paper's k, and that of the ADM and SAG papers' tables."""
DISTANCES_AT_ONCE = 2**24
"""64 MB in float32, however many features there are."""
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
    return PrecisionRecall(
        precision=share_inside(made, real, radii(real, neighbours)),
        recall=share_inside(real, made, radii(made, neighbours)),
    )


def radii(features: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Squared distance of each sample from its k-th nearest other one: (N, D) -> (N,) float64."""
    wanted = min(neighbours + 1 + SPARE, len(features))
    found, centred = [], features - features.mean(dim=0)
    for rows, near in _distances(centred, centred):
        nearest = near.topk(wanted, dim=1, largest=False).indices  # one of them is the sample itself, at 0
        exact = torch.stack([_exact(features[rows], features[column]) for column in nearest.T], dim=1)
        found.append(exact.kthvalue(neighbours + 1, dim=1).values)
    return torch.cat(found)


def share_inside(points: Tensor, centres: Tensor, reach: Tensor) -> float:
    """Share of points in at least one ball, surface included: (N, D), (M, D), squared radii (M,) -> 0 … 1."""
    middle, count = centres.mean(dim=0), 0
    near_points, near_centres = points - middle, centres - middle
    slack = ROUNDING * (near_centres.square().sum(dim=1).max() + near_points.square().sum(dim=1, keepdim=True))
    for rows, near in _distances(near_points, near_centres):
        margin = near.sub_(reach.to(near.dtype))
        inside = (margin < -slack[rows]).any(dim=1)
        doubtful = (margin.abs() <= slack[rows]).nonzero()
        doubtful = doubtful[~inside[doubtful[:, 0]]]
        for part in doubtful.split(2**14):
            sample, centre = part.T
            held = _exact(points[rows][sample], centres[centre]) <= reach[centre]
            inside[sample[held]] = True
        count += int(inside.sum())
    return count / len(points)


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
