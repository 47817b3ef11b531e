"""Masks of attention and of objects, as the paper's analyses use them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sagl.data.transforms import decode_image
from sagl.errors import UserError, require
from sagl.shapes import ImageUint8, Mask, TokenMap

SILHOUETTE_DISTANCE = 24
"""Grey levels by which a pixel of an object differs from the background in some channel."""


def threshold_mask(attention: TokenMap) -> Mask:
    """Mark the tokens whose attention, averaged over heads, exceeds its mean, 1: (N, head, H, W) -> (N, 1, H, W)."""
    return attention.mean(dim=1, keepdim=True) > 1


def mass_mask(attention: Tensor, mass: float = 0.6) -> Tensor:
    """Mark the most attended tokens that hold a share of the attention's sum: (…, H, W) -> (…, H, W) bool.

    It is the visualisation of DINO (Caron et al. 2021): tokens are left out from the least attended one on, while those
    left out hold at most 1 - `mass` of the sum.
    """
    flat = attention.flatten(-2).double()
    values, order = flat.sort(dim=-1)
    left_out = (values / values.sum(dim=-1, keepdim=True)).cumsum(dim=-1) <= 1 - mass
    return (~left_out).gather(-1, order.argsort(dim=-1)).unflatten(-1, attention.shape[-2:])


def random_mask_like(mask: Mask, seed: int) -> Mask:
    """Return a mask with as many tokens of each sample, drawn at random."""
    draw = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).flatten(1)
    ranks = draw.argsort(dim=1).argsort(dim=1)
    return (ranks < mask.flatten(1).sum(dim=1, keepdim=True)).view_as(mask)


def intersection_over_union(a: Mask, b: Mask) -> Tensor:
    """Return the intersection over union of each sample; 0 if both masks are empty: 2 x (N, 1, H, W) -> (N,)."""
    both, either = (a & b).flatten(1).sum(1), (a | b).flatten(1).sum(1)
    return both / either.clamp_min(1)


def silhouettes(images: ImageUint8) -> Mask:
    """Mark the pixels that differ from the background, the median of the image's border: (N, C, H, W) -> (N, 1, H, W).

    It finds objects only on backgrounds of one color, such as those of emoji and garments.
    """
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], dim=-1)
    background = border.float().median(dim=-1).values[..., None, None]
    return ((images.float() - background).abs() > SILHOUETTE_DISTANCE).any(dim=1, keepdim=True)


def read_masks(folder: Path, ids: Sequence[int], size: int) -> Mask:
    """Read the object masks of samples, ID.png with six digits, of which pixels above 127 belong to an object.

    Returns:
        (N, 1, size, size).

    Raises:
        UserError: a mask is missing, damaged, or has another size.
    """
    masks = []
    for sample_id in ids:
        path = folder / f"{sample_id:06d}.png"
        require(path.is_file(), f"`object_masks` must hold a mask of every sample, and {path} is missing.")
        try:
            pixels = decode_image(path.read_bytes(), 1)[..., 0]
        except Exception as error:  # Pillow raises many types
            raise UserError(f"`object_masks` must hold images, and {path} is damaged: {error}.") from error
        require(pixels.shape == (size, size), f"`object_masks` must be {size}x{size} pixels, and {path} is not.")
        masks.append(pixels > 127)
    return torch.stack(masks)[:, None]
