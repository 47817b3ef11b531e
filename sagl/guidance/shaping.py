"""Shapes of a guidance term: one part of it gets another weight before the term is added.

A shape splits the term d into a part p and the rest, and returns d + (w - 1) p: weight 0 removes the part, 1 changes
nothing. Shapes are linear in d, so they may act on a term that is scaled already.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.diffusion.process import cast_like, x0_hat_from_eps
from sagl.diffusion.schedule import Schedule
from sagl.guidance.base import Guidance, Term, map_term
from sagl.guidance.sag import gaussian_blur
from sagl.settings.guidance import BlurGuidance, GuidanceSettings, effective_kernel_size
from sagl.shapes import AlphaBar, Image

DEFAULT_SIGMA = 3.0
"""Standard deviation in pixels of the blur that separates frequencies, for methods that do not blur."""
Part = Callable[[Image, Image, Tensor | float], Image]
"""(term, x0_hat, mask) -> the part of the term that gets its own weight."""


def shape_guidance(guidance: Guidance, settings: GuidanceSettings, schedule: Schedule) -> Guidance:
    """Limit the norm of a guidance's terms, then weight one part of them: the order of APG's Algorithm 1.

    The norm is the root mean square of the change of x0_hat at scale 1.
    """
    part = _build_part(settings)

    def wrap(term: Term) -> Term:
        """Return the term with its norm limited and one part weighted."""

        def shaped_term(
            predict: NoisePredictor, x_t: Image, step: int, condition: Condition, base_pred: Prediction
        ) -> GuidanceTerm:
            """Return the shaped term of a step."""
            result, alpha_bar = term(predict, x_t, step, condition, base_pred), schedule.alpha_bar(step)
            factor, mask = norm_factor(result, settings, alpha_bar), result.extras.get("mask", 1.0)
            x0_hat = x0_hat_from_eps(x_t, base_pred.eps, alpha_bar, clip=True)

            def shape(direction: Image | float) -> Image | float:
                if not isinstance(direction, Tensor):
                    return direction
                direction = factor * direction
                return direction + (settings.shape_weight - 1) * part(direction, x0_hat, mask) if part else direction

            return replace(result, eps=shape(result.eps), score=shape(result.score))

        return shaped_term

    return map_term(guidance, wrap)


def _build_part(settings: GuidanceSettings) -> Part | None:
    own_sigma, kernel_size = DEFAULT_SIGMA, None
    if isinstance(settings, BlurGuidance):
        own_sigma, kernel_size = settings.blur_sigma, settings.kernel_size
    sigma = own_sigma if settings.shape_sigma is None else settings.shape_sigma

    def blur(images: Image) -> Image:
        return gaussian_blur(images, effective_kernel_size(kernel_size, min(images.shape[-2:])), sigma)

    parts: dict[str, Part] = {
        "off_x0": along_x0,
        "off_unsharp": partial(along_unsharp, blur),
        "high_pass": lambda direction, *_: blur(direction),  # frequency-decoupled guidance, FDG; arXiv 2506.19713
    }
    return parts.get(settings.shape)


def along_x0(direction: Image, x0_hat: Image, _: Tensor | float) -> Image:
    """Return the part along x0_hat, which saturates images (adaptive projected guidance, APG; arXiv 2410.02416)."""
    return project(direction, x0_hat)


def along_unsharp(blur: Callable[[Image], Image], direction: Image, x0_hat: Image, mask: Tensor | float) -> Image:
    """Return the part along m · (x0_hat - blur(x0_hat)), an unsharp mask of the image; m is 1 without a mask."""
    return project(direction, mask * (x0_hat - blur(x0_hat)))


def project(direction: Image, onto: Image) -> Image:
    """Project each sample onto another image: <d, v> / <v, v> v, and 0 for v = 0."""
    dims = (1, 2, 3)
    squared = onto.square().sum(dim=dims, keepdim=True).clamp(min=torch.finfo(onto.dtype).tiny)
    return (direction * onto).sum(dim=dims, keepdim=True) / squared * onto


def norm_factor(term: GuidanceTerm, settings: GuidanceSettings, alpha_bar: AlphaBar) -> Tensor | float:
    """Return min(1, r / |d|) for each sample, (B, 1, 1, 1): APG's limit of the norm."""
    shift = x0_shift(term, alpha_bar)
    if settings.max_norm is None or not isinstance(shift, Tensor):
        return 1.0
    return (settings.max_norm * abs(settings.scale) / rms(shift)).clamp(max=1)


def x0_shift(term: GuidanceTerm, alpha_bar: AlphaBar) -> Image | float:
    """Return x0_hat without the term minus x0_hat with it (eq. 8, 9); 0.0 for a term of zeros."""
    root = (1 - alpha_bar).sqrt()
    total = [
        cast_like(coefficient, value) * value
        for coefficient, value in ((root / alpha_bar.sqrt(), term.eps), (-root * root / alpha_bar.sqrt(), term.score))
        if isinstance(value, Tensor)
    ]
    return sum(total) if total else 0.0


def rms(images: Image) -> Tensor:
    """Return the root mean square of each sample: (B, C, H, W) -> (B, 1, 1, 1)."""
    return images.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
