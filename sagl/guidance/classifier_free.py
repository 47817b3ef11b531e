"""Classifier-free guidance: eq. 11 (Ho & Salimans 2021)."""

from dataclasses import replace

from sagl.diffusion.predictor import Condition
from sagl.errors import require
from sagl.guidance.base import Guidance, GuidanceContext, guide_by_condition
from sagl.settings.guidance import ClassifierFreeGuidance
from sagl.shapes import Image


def build_cfg(settings: ClassifierFreeGuidance, _: GuidanceContext) -> Guidance:
    """Guide away from the prediction for the null label. A guided step costs one more network evaluation."""

    def without_labels(_x_t: Image, _step: int, condition: Condition) -> Condition:
        require(condition.labels is not None, "`labels` must be given for classifier-free guidance, got none.")
        return replace(condition, labels=None)

    return guide_by_condition(settings.scale, without_labels)
