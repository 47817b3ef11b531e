"""Gaussian blur with mirrored borders: the degradation that takes away fine detail alone."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sagl.settings.errors import require
from sagl.settings.guidance import DEFAULT_KERNEL
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


def fitting_kernel(kernel_size: int | None, image_size: int) -> int:
    """The kernel that is used on images of a size: the one asked for, or the paper's 31 as far as it fits.

    Raises:
        UserError: the kernel asked for reaches over the mirrored border.
    """
    largest = 2 * image_size - 1
    if kernel_size is None:
        return min(DEFAULT_KERNEL, largest)
    require(
        kernel_size <= largest,
        f"`sag.kernel_size` must be at most {largest} for {image_size}x{image_size} images, got {kernel_size}.",
    )
    return kernel_size
