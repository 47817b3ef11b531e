"""Pixels as bytes and pixels as numbers: uint8 in 0…255 <-> float in [-1, 1]. The one place that converts."""

import torch

from sagl.shapes import Image, ImageUint8


def to_float(images_uint8: ImageUint8) -> Image:
    """0…255 -> [-1, 1]: (B, C, H, W) uint8 -> float32."""
    return images_uint8.to(torch.float32) / 127.5 - 1


def to_uint8(images: Image) -> ImageUint8:
    """[-1, 1] -> 0…255, as in the public code: floor(clamp((x + 1) · 127.5)): (B, C, H, W) -> uint8."""
    return ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def to_rgb(images_uint8: ImageUint8) -> ImageUint8:
    """Grey images in three equal channels, others as they are: (B, 1 or C, H, W) -> (B, 3 or C, H, W)."""
    return images_uint8.expand(-1, 3, -1, -1) if images_uint8.shape[1] == 1 else images_uint8
