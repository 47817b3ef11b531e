"""Gaussian blur with mirrored borders: the degradation that takes away fine detail alone."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from sagl.shapes import Image


def gaussian_kernel(kernel_size: int, blur_sigma: float) -> Tensor:
    """The normal density at whole pixels, cut and normalised: -> (kernel_size,) float64, sum 1."""
    offsets = torch.arange(kernel_size, dtype=torch.float64) - (kernel_size - 1) / 2
    weights = (-0.5 * (offsets / blur_sigma) ** 2).exp()
    return weights / weights.sum()


@lru_cache(maxsize=8)
def blur_matrix(size: int, kernel_size: int, blur_sigma: float) -> Tensor:
    """What each pixel of a line gives to each of the blurred: -> (size, size) float64.

    The line's ends are mirrored without repeating the last pixel; `kernel_size` // 2 must be below `size`.
    """
    reach = kernel_size // 2
    mirrored = F.pad(torch.eye(size, dtype=torch.float64)[None], (reach, reach), mode="reflect")[0]
    return mirrored.unfold(-1, kernel_size, 1) @ gaussian_kernel(kernel_size, blur_sigma)


def gaussian_blur(images: Image, kernel_size: int, blur_sigma: float) -> Image:
    """Blur along rows, then columns; borders are mirrored without repeating the edge: (B, C, H, W) -> the same.

    A constant image is a fixed point. `kernel_size` // 2 must be below H and W.
    """
    along_columns, along_rows = (blur_matrix(size, kernel_size, blur_sigma).to(images) for size in images.shape[-2:])
    return along_columns.mT @ (images @ along_rows)
