"""Eq. 16: x_t with the masked part of its content blurred, and its noise as it was."""

import torch

from sagl.diffusion.process import add_noise
from sagl.shapes import AlphaBar, Image, Mask


def degraded_content(x_0: Image, blurred: Image, mask: Mask) -> Image:
    """Clean images with what is masked of them blurred: -> (B, C, H, W)."""
    return torch.where(mask, blurred, x_0)


def degrade(x0_hat: Image, x0_blurred: Image, mask: Mask, eps: Image, alpha_bar: AlphaBar) -> Image:
    """The masked mix of the estimate and its blur, noised again by the same eps: -> x_t_degraded (B, C, H, W).

    Eq. 16 mixes after the noising; noising is affine, so mixing before is the same. With nothing masked and x0_hat
    not clipped it is x_t.
    """
    return add_noise(degraded_content(x0_hat, x0_blurred, mask), eps, alpha_bar)
