"""Gaussian blur with mirrored borders: the degradation that takes away fine detail alone."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sagl.shapes import Image


def gaussian_kernel(kernel_size: int, blur_sigma: float) -> Tensor:
    """The normal density at whole pixels, cut and normalised: -> (kernel_size,) float64, sum 1."""
    offsets = torch.arange(kernel_size, dtype=torch.float64) - (kernel_size - 1) / 2
    weights = (-0.5 * (offsets / blur_sigma) ** 2).exp()
    return weights / weights.sum()


def gaussian_blur(images: Image, kernel_size: int, blur_sigma: float) -> Image:
    """Blur along rows, then columns; borders are mirrored without repeating the edge: (B, C, H, W) -> the same.

    A constant image is a fixed point. `kernel_size` // 2 must be below H and W.
    """
    reach, (height, width) = kernel_size // 2, images.shape[-2:]
    kernel = gaussian_kernel(kernel_size, blur_sigma).to(images)
    planes = F.pad(images, (reach, reach, reach, reach), mode="reflect").reshape(
        -1, 1, height + 2 * reach, width + 2 * reach
    )
    rows = F.conv2d(planes, kernel[None, None, None, :])
    return F.conv2d(rows, kernel[None, None, :, None]).reshape(images.shape)
