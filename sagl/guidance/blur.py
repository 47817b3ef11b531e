"""Blur guidance: eq. 15 of Hong et al. 2023."""

from dataclasses import replace

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.diffusion.process import add_noise, maybe_clip, x0_hat_from_eps
from sagl.guidance.base import Guidance, GuidanceContext, extrapolate
from sagl.guidance.sag import gaussian_blur
from sagl.settings.guidance import BlurGuidance, effective_kernel_size
from sagl.shapes import Image


def build_blur(settings: BlurGuidance, context: GuidanceContext) -> Guidance:
    """Guide away from the prediction for x_t blurred as a whole: eps + s (eps - eps').

    As in SAG, x0_hat is blurred and noised again with the same eps. A guided step costs one more network evaluation.
    """

    def blurred_input(x_t: Image, step: int, base_pred: Prediction) -> Image:
        alpha_bar, kernel_size = context.schedule.alpha_bar(step), settings.kernel_size
        x0_hat = maybe_clip(x0_hat_from_eps(x_t, base_pred.eps, alpha_bar), settings.clip_x0)
        x0_blurred = gaussian_blur(x0_hat, effective_kernel_size(kernel_size, min(x_t.shape[-2:])), settings.blur_sigma)
        return add_noise(x0_blurred, base_pred.eps, alpha_bar)

    def term(
        predict: NoisePredictor, x_t: Image, step: int, condition: Condition, base_pred: Prediction
    ) -> GuidanceTerm:
        weak_pred = predict(blurred_input(x_t, step, base_pred), step, replace(condition, degraded=True))
        return extrapolate(weak_pred, base_pred, settings.scale)

    return Guidance(term=term)
