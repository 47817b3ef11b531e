"""Masks of self-attention guidance: the pixels that are degraded (Hong et al. 2023, table 4).

A strategy gives every token of one grid a score. Tokens are chosen by score, and nearest neighbours enlarge them to
pixels, so that strategies differ in the choice of tokens alone. The grid is that of the first attention site.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sagl.diffusion.noise import SampleRngs, guidance_rngs
from sagl.diffusion.predictor import Condition
from sagl.errors import UserError
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.shapes import AttentionSite, Image, Mask, TokenMap

PAPER_AREA = 0.4
"""Masked fraction of the image in the paper's comparison of strategies."""
MaskFunction = Callable[[Image, int, Condition, Mapping[AttentionSite, TokenMap]], Mask]
"""(x0_hat, step, condition, attention received at the sites) -> the mask."""
Scores = Callable[[Image, int, Condition, TokenMap], TokenMap]
"""(x0_hat, step, condition, the sites' average) -> (B, 1, H', W') scores on the grid of that average.

Without an area fraction, tokens with a score above `sag.threshold` (default 1.0) are chosen, so scores should be scaled
to a mean of 1.
"""
LoadClassAttention = Callable[[str], Callable[[Image], TokenMap]]
"""File of DINO weights -> function that computes the class attention of images, as `load_class_attention` returns."""


def load_class_attention(path: str) -> Callable[[Image], TokenMap]:
    """Load a DINO transformer, and return the function (images) -> its class attention.

    Raises:
        UserError: the file does not exist or is not a DINO transformer.
    """
    from sagl.guidance.dino import class_attention, load_dino  # imports torchvision's models

    return partial(class_attention, load_dino(path))


def build_mask(
    settings: SelfAttentionGuidance,
    sites: Sequence[AttentionSite],
    load_attention: LoadClassAttention = load_class_attention,
) -> MaskFunction:
    """Return the function that masks the images of a step; without sites it masks everything (eq. 15).

    Raises:
        UserError: the DINO network cannot be loaded.
    """
    score = _build_scores(settings, load_attention)

    def mask(x0_hat: Image, step: int, condition: Condition, attention: Mapping[AttentionSite, TokenMap]) -> Mask:
        size = (x0_hat.shape[-2], x0_hat.shape[-1])
        if not sites:
            return torch.ones(len(x0_hat), 1, *size, dtype=torch.bool, device=x0_hat.device)
        scores = score(x0_hat, step, condition, average_sites([attention[site] for site in sites], settings.head))
        fraction = PAPER_AREA if settings.is_random and settings.area_fraction is None else settings.area_fraction
        return enlarge(select_tokens(scores, settings.threshold, fraction, soft=settings.soft), size)

    return mask


def _build_scores(settings: SelfAttentionGuidance, load_attention: LoadClassAttention) -> Scores:
    """Return the scores of the strategy `settings.mask`."""
    if settings.mask == "random":
        return lambda _, step, condition, grid: uniform_scores(_rngs(condition, step), grid.shape[-2:]).to(grid)
    if settings.mask == "square":

        def square(_: Image, step: int, condition: Condition, grid: TokenMap) -> TokenMap:
            size = (grid.shape[-2], grid.shape[-1])
            sides = rectangle_sides(num_tokens(settings.area_fraction or PAPER_AREA, size), size)
            return random_rectangles(sides, size, _rngs(condition, step)).to(grid)

        return square
    if settings.mask == "dino":
        assert settings.dino_checkpoint is not None, "check_network requires it"
        class_attention = load_attention(settings.dino_checkpoint)
        return lambda x0_hat, _, __, grid: to_grid(class_attention(x0_hat), grid)
    return lambda _, __, ___, attention_received: attention_received


def _rngs(condition: Condition, step: int) -> SampleRngs:
    if condition.samples is None:
        raise UserError("`samples` must be given for random masks, got none.")
    return guidance_rngs(condition.samples, "sag", step)


# ------------------------------------------------------------------------------------------------------ scores


def average_sites(maps: Sequence[TokenMap], head: int | None = None) -> TokenMap:
    """Average the attention received over heads, then over sites: (B, head, H', W') each -> (B, 1, H', W'), mean 1.

    The result is on the grid of the first site. With `head`, only that head of every site counts.
    """
    maps = [m.mean(dim=1, keepdim=True) if head is None else m[:, head : head + 1] for m in maps]
    return torch.stack([to_grid(m, maps[0]) for m in maps]).mean(dim=0)


def to_grid(tokens: TokenMap, other: TokenMap) -> TokenMap:
    """Resize a map to the grid of another: finer ones are averaged over its tokens, coarser ones repeated."""
    return F.adaptive_avg_pool2d(tokens, (other.shape[-2], other.shape[-1]))


def uniform_scores(rngs: SampleRngs, size: Sequence[int]) -> Tensor:
    """Draw a uniform number in [0, 1) for every token: -> (B, 1, H', W') float64 on the CPU."""
    return torch.from_numpy(np.stack([rng.random((1, *size)) for rng in rngs]))


def random_rectangles(sides: tuple[int, int], size: tuple[int, int], rngs: SampleRngs) -> Mask:
    """Draw a rectangle per sample with these sides, fully inside: -> (B, 1, H, W) bool on the CPU."""
    mask = torch.ones(len(rngs), 1, *size, dtype=torch.bool)
    for dim, (side, length) in enumerate(zip(sides, size, strict=True), start=2):
        start = torch.tensor([[int(rng.integers(length - side + 1))] for rng in rngs])
        position = torch.arange(length)
        is_inside = (position >= start) & (position < start + side)
        mask &= is_inside[:, None, :, None] if dim == 2 else is_inside[:, None, None, :]
    return mask


def rectangle_sides(count: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the sides of the smallest rectangle of about the grid's aspect ratio that has `count` tokens or more."""
    height, width = size
    rows = max(math.ceil((count * height / width) ** 0.5), math.ceil(count / width))
    return rows, math.ceil(count / rows)


# ---------------------------------------------------------------------------------------------- choice of tokens


def num_tokens(area_fraction: float, size: Sequence[int]) -> int:
    """Return how many tokens of a grid make a fraction of the area; at least one."""
    return max(1, round(area_fraction * math.prod(size)))


def select_tokens(
    scores: TokenMap, threshold: float, area_fraction: float | None = None, *, soft: bool = False
) -> Mask:
    """Choose tokens by score: (B, 1, H', W') -> the same, bool or weights.

    Args:
        scores: (B, 1, H', W').
        threshold: tokens above it are chosen, if there is no `area_fraction`.
        area_fraction: choose the same number of tokens, with the largest scores, in every sample; of equal scores the
            first ones in reading order.
        soft: return the weight min(1, score / (2 · threshold)): half at the threshold. With `area_fraction`, the
            threshold is midway between the smallest chosen score and the largest other one.
    """
    flat, limit = scores.flatten(1), torch.as_tensor(threshold)
    if area_fraction is not None:
        count = num_tokens(area_fraction, scores.shape[-2:])
        order = flat.argsort(dim=1, descending=True, stable=True)
        if not soft:
            chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(1, order[:, :count], True)
            return chosen.view_as(scores)
        descending = F.pad(flat.gather(1, order), (0, 1))  # no token is left out at area 1: 0 takes its place
        limit = descending[:, count - 1 : count + 1].mean(dim=1)[:, None, None, None]
    return (scores / (2 * limit)).clamp(max=1) if soft else scores > threshold


def enlarge(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge a map of tokens to pixels by nearest neighbours: (B, 1, H', W') -> (B, 1, H, W) of the same type."""
    return F.interpolate(tokens.float(), size=size, mode="nearest").to(tokens.dtype)


def mask_from_attention(attention_received: TokenMap, threshold: float, size: tuple[int, int]) -> Mask:
    """Mark the pixels whose token receives more attention than the threshold: (B, head, H', W') -> (B, 1, H, W) bool.

    Attention received, averaged over heads, has mean 1 over tokens. For blur-aware training; the masks of guidance are
    those of `build_mask`.
    """
    return enlarge(select_tokens(average_sites([attention_received]), threshold), size)
