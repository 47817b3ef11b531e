"""Guidances whose weaker prediction is the same network told less: classifier-free guidance (eq. 11)."""

from dataclasses import replace

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.errors import require
from sagl.guidance.base import Guidance, extrapolate
from sagl.settings.guidance import ClassifierFreeGuidance
from sagl.shapes import Image


def classifier_free_guidance(settings: ClassifierFreeGuidance) -> Guidance:
    """Away from the prediction for the null label (eq. 11; Ho & Salimans 2021).

    Costs one more pass a step; none at scale 0. The labels must be given, and the network have a null label.
    """

    def direction(
        denoise: NoisePredictor, x_t: Image, step: int, condition: Condition, plain: Prediction
    ) -> GuidanceTerm:
        require(condition.labels is not None, "`cfg.scale` needs labels, got the null label. Give --labels random.")
        return extrapolate(denoise(x_t, step, replace(condition, labels=None)), plain, settings.scale)

    return Guidance(direction=direction, when=lambda _: settings.scale != 0)
