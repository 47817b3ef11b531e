"""Images: conversion between uint8 in 0…255 and float in [-1, 1], grids, PNG files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image as PILImage
from torch.nn.functional import pad

from sagl.shapes import Image, ImageUint8

SMALL = 64
"""A grid shows images up to this side at twice their size and sixteen per row; larger ones eight per row."""


def to_float(images_uint8: ImageUint8) -> Image:
    """Convert 0…255 to [-1, 1]: (B, C, H, W) uint8 -> float32."""
    return images_uint8.to(torch.float32) / 127.5 - 1


def to_uint8(images: Image) -> ImageUint8:
    """Convert [-1, 1] to 0…255 as the public code does, floor(clamp((x + 1) · 127.5)): (B, C, H, W) -> uint8."""
    return ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def noise_to_uint8(image: Image) -> ImageUint8:
    """Convert an image that may exceed [-1, 1], such as noise, scaled to its largest value: (C, H, W) -> uint8."""
    image = image.float()
    return to_uint8(image / image.abs().max().clamp_min(1))


def to_rgb(images_uint8: ImageUint8) -> ImageUint8:
    """Repeat the channel of gray images three times: (B, 1, H, W) -> (B, 3, H, W). Others are returned unchanged."""
    return images_uint8.expand(-1, 3, -1, -1) if images_uint8.shape[1] == 1 else images_uint8


def image_grid(rows: Sequence[ImageUint8], columns: int | None = None) -> ImageUint8:
    """Arrange images in a grid: R rows of (B, C, H, W) -> (3, H', W').

    Image i of every row is below image i of the row before. After `columns` images a new block of rows begins.
    """
    is_small = rows[0].shape[-1] <= SMALL
    columns = min(columns or (16 if is_small else 8), len(rows[0]))
    blocks = []
    for start in range(0, len(rows[0]), columns):
        for row in rows:
            part = to_rgb(row[start : start + columns])
            blank = part.new_full((columns - len(part), *part.shape[1:]), 255)
            blocks.append(torch.cat([part, blank]))
    zoom = 2 if is_small else 1
    enlarged = torch.cat(blocks).repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    return _with_frames(enlarged, columns)


def _with_frames(images: ImageUint8, columns: int) -> ImageUint8:
    """Arrange images as torchvision's `make_grid` with padding 2; the import of torchvision takes two seconds."""
    if len(images) == 1:
        return images[0]
    framed = pad(images, (2, 0, 2, 0), value=255)
    grid = framed.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return pad(grid, (0, 2, 0, 2), value=255)


def save_png(image: ImageUint8, path: Path) -> None:
    """Write a PNG file, (C, H, W) uint8; call it inside `atomic_file`."""
    PILImage.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path, format="PNG")
