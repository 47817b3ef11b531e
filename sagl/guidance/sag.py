"""Self-attention guidance: Algorithm 1 of Hong et al. 2023."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.diffusion.process import add_noise, x0_hat_from_eps
from sagl.diffusion.schedule import Schedule
from sagl.guidance.base import Guidance, GuidanceContext, extrapolate
from sagl.guidance.masks import LoadClassAttention, build_mask, load_class_attention
from sagl.settings.guidance import BlurGuidance, SelfAttentionGuidance, effective_kernel_size
from sagl.shapes import AlphaBar, AttentionSite, Image, Mask


class DegradedStep(NamedTuple):
    """Tensors of Algorithm 1 before the second evaluation."""

    x0_hat: Image
    x0_blurred: Image
    mask: Mask
    x_t_degraded: Image


Degrade = Callable[[Image, int, Condition, Prediction], DegradedStep]
"""(x_t, step, condition, base prediction with the attention of `attention_sites`) -> the degraded step."""


def build_sag(settings: SelfAttentionGuidance, context: GuidanceContext) -> Guidance:
    """Guide away from the prediction for x_t with its most attended details blurred (eq. 16, 17).

    A guided step costs one more network evaluation. The term's `extras` hold the mask.
    """
    degrade = build_degrade(settings, context.schedule, context.load_attention)

    def term(
        predict: NoisePredictor, x_t: Image, step: int, condition: Condition, base_pred: Prediction
    ) -> GuidanceTerm:
        mask, x_t_degraded = degrade(x_t, step, condition, base_pred)[2:]  # frees the others before the evaluation
        degraded_pred = predict(x_t_degraded, step, replace(condition, degraded=True))
        return replace(extrapolate(degraded_pred, base_pred, settings.scale), extras={"mask": mask})

    def prepare_condition(condition: Condition) -> Condition:
        return replace(condition, attention_sites=condition.attention_sites + attention_sites(settings))

    def mask(x_t: Image, step: int, condition: Condition, base_pred: Prediction) -> Mask:
        return degrade(x_t, step, condition, base_pred).mask

    return Guidance(term=term, prepare_condition=prepare_condition, mask=mask)


def attention_sites(settings: SelfAttentionGuidance) -> tuple[AttentionSite, ...]:
    """Return the sites whose attention makes the mask."""
    return tuple(AttentionSite(name, settings.heads) for name in settings.sites)


def build_degrade(
    settings: SelfAttentionGuidance, schedule: Schedule, load_attention: LoadClassAttention = load_class_attention
) -> Degrade:
    """Return the function that degrades x_t as Algorithm 1 does before the second evaluation.

    Raises:
        UserError: the DINO network cannot be loaded.
    """
    mask_of = build_mask(settings, attention_sites(settings), load_attention)

    def degrade(x_t: Image, step: int, condition: Condition, base_pred: Prediction) -> DegradedStep:
        alpha_bar = schedule.alpha_bar(step)
        x0_hat, x0_blurred = blur_x0_hat(x_t, base_pred.eps, alpha_bar, settings)
        mask = mask_of(x0_hat, step, condition, base_pred.attention)
        x_t_degraded = degrade_input(x0_hat, x0_blurred, mask, base_pred.eps, alpha_bar)
        return DegradedStep(x0_hat, x0_blurred, mask, x_t_degraded)

    return degrade


def blur_x0_hat(x_t: Image, eps: Image, alpha_bar: AlphaBar, settings: BlurGuidance) -> tuple[Image, Image]:
    """Return x0_hat, clipped if the settings say so, and the same blurred: -> 2 x (B, C, H, W)."""
    x0_hat = x0_hat_from_eps(x_t, eps, alpha_bar, clip=settings.clip_x0)
    kernel_size = effective_kernel_size(settings.kernel_size, min(x_t.shape[-2:]))
    return x0_hat, gaussian_blur(x0_hat, kernel_size, settings.blur_sigma)


def blend(x_0: Image, x0_blurred: Image, mask: Mask) -> Image:
    """Blend clean images with their blurred ones, the mask the weight of the latter: -> (B, C, H, W)."""
    if mask.dtype == torch.bool:
        return torch.where(mask, x0_blurred, x_0)
    return torch.lerp(x_0, x0_blurred, mask.to(x_0))


def degrade_input(x0_hat: Image, x0_blurred: Image, mask: Mask, eps: Image, alpha_bar: AlphaBar) -> Image:
    """Eq. 16: blur x0_hat where it is masked and add the same noise eps again: -> x_t_degraded (B, C, H, W).

    Eq. 16 blends after adding noise. Adding noise is affine, so blending before it gives the same. Without masked
    pixels the result is x_t, provided that x0_hat is not clipped.
    """
    return add_noise(blend(x0_hat, x0_blurred, mask), eps, alpha_bar)


def gaussian_blur(images: Image, kernel_size: int, blur_sigma: float) -> Image:
    """Blur along rows, then columns, with borders mirrored without repeating the edge: (B, C, H, W) -> the same.

    A constant image is a fixed point. `kernel_size` // 2 must be below H and W. Autocast does not change the result.
    """
    along_columns, along_rows = (
        blur_matrix(size, kernel_size, blur_sigma, images.dtype, images.device) for size in images.shape[-2:]
    )
    with torch.autocast(images.device.type, enabled=False):  # would multiply in 16 bits
        return along_columns.mT @ (images @ along_rows)


@lru_cache(maxsize=8)
def blur_matrix(size: int, kernel_size: int, blur_sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the one-dimensional Gaussian blur with mirrored ends as a matrix, from float64: -> (size, size).

    It is cached on the device, so that no step copies it.
    """
    half_width = kernel_size // 2
    mirrored = F.pad(torch.eye(size, dtype=torch.float64)[None], (half_width, half_width), mode="reflect")[0]
    return (mirrored.unfold(-1, kernel_size, 1) @ gaussian_kernel(kernel_size, blur_sigma)).to(device, dtype)


def gaussian_kernel(kernel_size: int, blur_sigma: float) -> Tensor:
    """Return the normal density at whole pixels, truncated and normalised: -> (kernel_size,) float64, sum 1."""
    offsets = torch.arange(kernel_size, dtype=torch.float64) - (kernel_size - 1) / 2
    weights = (-0.5 * (offsets / blur_sigma) ** 2).exp()
    return weights / weights.sum()
