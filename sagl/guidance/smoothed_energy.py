"""Smoothed energy guidance: Hong 2024, arXiv 2408.00760."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sagl.diffusion.predictor import Condition
from sagl.guidance.base import Guidance, GuidanceContext, edit_attention, guide_by_condition
from sagl.settings.guidance import SmoothedEnergyGuidance
from sagl.shapes import Heads, Image


def build_seg(settings: SmoothedEnergyGuidance, _: GuidanceContext) -> Guidance:
    """Guide away from the prediction with blurred attention weights: eps + s (eps - eps').

    In eps', the heads of some sites are softmax(G * (Q Kᵀ) / √d) V, where G is a Gaussian over the grid of the queries.
    The blur is linear in the queries, so G * (Q Kᵀ) = (G * Q) Kᵀ, and only the queries are blurred. An infinite sigma
    gives all of them their mean. A guided step costs one more network evaluation.
    """
    sigma = settings.blur_sigma
    edit = attend_with_mean_query if sigma is None else partial(attend_with_blurred_queries, sigma)

    def edited(_x_t: Image, _step: int, condition: Condition) -> Condition:
        return edit_attention(condition, settings.sites, edit)

    return guide_by_condition(settings.scale, edited)


def attend_with_mean_query(query: Heads, key: Heads, value: Heads, _size: tuple[int, int]) -> Heads:
    """Return the heads of the mean query, the same for all tokens."""
    return F.scaled_dot_product_attention(query.mean(dim=-2, keepdim=True), key, value).expand_as(value)


def attend_with_blurred_queries(
    blur_sigma: float, query: Heads, key: Heads, value: Heads, size: tuple[int, int]
) -> Heads:
    """Return the heads of the queries blurred along columns and rows of the grid of tokens, (H, W)."""
    along_columns, along_rows = (blur_matrix(n, blur_sigma, query.device).to(query.dtype) for n in size)
    blurred = along_columns @ query.mT.unflatten(-1, size) @ along_rows.mT
    return F.scaled_dot_product_attention(blurred.flatten(-2).mT, key, value)


def blur_matrix(size: int, blur_sigma: float, device: torch.device) -> Tensor:
    """Return the one-dimensional Gaussian blur of a mirrored grid as a matrix: -> (size, size) float64.

    The mirror repeats the edge, so that rows and columns sum to 1: the blur keeps the mean, and tends to it as sigma
    grows. From a sigma of twice the grid on, both are equal to six digits.
    """
    sigma = min(blur_sigma, 2 * size)
    offsets = torch.arange(-math.ceil(5 * sigma), math.ceil(5 * sigma) + 1, device=device)
    weights = (-0.5 * (offsets.double() / sigma) ** 2).exp()
    unfolded = (torch.arange(size, device=device)[:, None] + offsets) % (2 * size)
    source = torch.minimum(unfolded, 2 * size - 1 - unfolded)
    matrix = torch.zeros(size, size, dtype=torch.float64, device=device)
    return matrix.scatter_add_(1, source, (weights / weights.sum()).expand(size, -1))
