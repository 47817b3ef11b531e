"""Classifier-free guidance: eq. 11 (Ho & Salimans 2021)."""

from dataclasses import replace

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.errors import require
from sagl.guidance.base import Guidance, GuidanceContext, extrapolate
from sagl.settings.guidance import ClassifierFreeGuidance
from sagl.shapes import Image


def build_cfg(settings: ClassifierFreeGuidance, _: GuidanceContext) -> Guidance:
    """Guide away from the prediction for the null label. A guided step costs one more network evaluation."""

    def term(
        predict: NoisePredictor, x_t: Image, step: int, condition: Condition, base_pred: Prediction
    ) -> GuidanceTerm:
        require(condition.labels is not None, "`labels` must be given for classifier-free guidance, got none.")
        return extrapolate(predict(x_t, step, replace(condition, labels=None)), base_pred, settings.scale)

    return Guidance(term=term)
