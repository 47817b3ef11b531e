"""Autoguidance: Karras et al. 2024, arXiv 2406.02507."""

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction, make_predictor
from sagl.guidance.base import Guidance, GuidanceContext, extrapolate
from sagl.settings.guidance import Autoguidance
from sagl.shapes import Image


def build_autoguidance(settings: Autoguidance, context: GuidanceContext) -> Guidance:
    """Guide away from the prediction of a weaker network: eps + s (eps - eps'), where s is the paper's w - 1.

    A guided step costs one evaluation of the weaker network, which needs labels if it has classes and no null label.

    Raises:
        UserError: no such network, or one for other images, classes or noise.
    """
    assert settings.checkpoint is not None  # `check_network` requires it
    weak_network = context.load_network(settings.checkpoint, settings.weights)
    weak_predict = make_predictor(weak_network, context.schedule, "fixed_small")  # its variance is not used

    def term(_: NoisePredictor, x_t: Image, step: int, condition: Condition, base_pred: Prediction) -> GuidanceTerm:
        return extrapolate(weak_predict(x_t, step, condition), base_pred, settings.scale)

    weak_settings = getattr(weak_network, "settings", context.network_settings)
    return Guidance(term=term, weak_network_settings=weak_settings, needs_labels=weak_settings.needs_labels)
