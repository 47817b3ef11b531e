"""Grids of images: rows of samples, under each other what belongs together."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import make_grid

from sagl.shapes import ImageUint8
from sagl.utils.images import to_rgb


def colorize_masks(share: Tensor) -> ImageUint8:
    """Each pixel's share of guided steps in which it was masked: (B, 1, H, W) in [0, 1] -> (B, 3, H, W) uint8.

    Black is never, white is always, by way of dark blue and orange.
    """
    stops = torch.tensor([[0, 0, 0], [38, 42, 110], [222, 120, 40], [255, 255, 255]], dtype=torch.float32)
    at = share.clamp(0, 1) * (len(stops) - 1)
    below = at.floor().long().clamp(max=len(stops) - 2)
    colour = torch.lerp(stops[below], stops[below + 1], (at - below)[..., None])
    return colour[:, 0].permute(0, 3, 1, 2).round().to(torch.uint8)


SMALL = 64
"""Images up to this side are shown twice as large, and sixteen to a row; larger ones as they are, eight to a row."""


def image_grid(rows: Sequence[ImageUint8], columns: int | None = None, padding: int = 2) -> ImageUint8:
    """Image i of every row under each other; after `columns` samples a new block: R of (B, C, H, W) -> (3, H', W').

    Pixels of small images are doubled, so that they can be looked at.
    """
    small = rows[0].shape[-1] <= SMALL
    columns = min(columns or (16 if small else 8), len(rows[0]))
    blocks = []
    for start in range(0, len(rows[0]), columns):
        for row in rows:
            part = to_rgb(row[start : start + columns])
            blank = part.new_full((columns - len(part), *part.shape[1:]), 255)
            blocks.append(torch.cat([part, blank]))
    zoom = 2 if small else 1
    enlarged = torch.cat(blocks).repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    return make_grid(enlarged, nrow=columns, padding=padding, pad_value=255)


def save_png(picture: ImageUint8, path: Path, software: str | None = None) -> None:
    """(C, H, W) uint8 -> a PNG file; the bytes are stored as they are. To be called inside `atomic_file`.

    Args:
        picture: what to store.
        path: where.
        software: what the file says of itself near its beginning, if anything.
    """
    about = PngInfo()
    if software:
        about.add_text("Software", software)
    image = PILImage.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    image.save(path, format="PNG", pnginfo=about)
