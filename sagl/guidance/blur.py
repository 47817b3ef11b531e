"""Blur guidance: eq. 15 of Hong et al. 2023."""

from dataclasses import replace

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.diffusion.process import add_noise
from sagl.guidance.base import Guidance, GuidanceContext, extrapolate
from sagl.guidance.sag import blur_x0_hat
from sagl.settings.guidance import BlurGuidance
from sagl.shapes import Image


def build_blur(settings: BlurGuidance, context: GuidanceContext) -> Guidance:
    """Guide away from the prediction for x_t blurred as a whole: eps + s (eps - eps').

    As in SAG, x0_hat is blurred and noised again with the same eps. A guided step costs one more network evaluation.
    """

    def blurred_input(x_t: Image, step: int, base_pred: Prediction) -> Image:
        alpha_bar = context.schedule.alpha_bar(step)
        _, x0_blurred = blur_x0_hat(x_t, base_pred.eps, alpha_bar, settings)
        return add_noise(x0_blurred, base_pred.eps, alpha_bar)

    def term(
        predict: NoisePredictor, x_t: Image, step: int, condition: Condition, base_pred: Prediction
    ) -> GuidanceTerm:
        weak_pred = predict(blurred_input(x_t, step, base_pred), step, replace(condition, degraded=True))
        return extrapolate(weak_pred, base_pred, settings.scale)

    return Guidance(term=term)
