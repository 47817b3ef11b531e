"""Epsilon scaling (ADM-ES): Ning et al. 2024, arXiv 2308.15321."""

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.errors import require
from sagl.guidance.base import Guidance, GuidanceContext
from sagl.settings.guidance import EpsScaling
from sagl.shapes import Image


def build_eps_scaling(settings: EpsScaling, context: GuidanceContext) -> Guidance:
    """Divide the base prediction's eps by λ = b + k · step, as the term (1/λ - 1) eps, without a further evaluation.

    b is 1 + scale, k is the slope, and step 0 is the cleanest. Terms of other methods are not divided.

    Raises:
        UserError: λ is not above 0 in every step.
    """
    divisors = [1 + settings.scale + settings.slope * step for step in range(context.schedule.num_steps)]
    require(
        min(divisors) > 0,
        f"`eps_scaling.scale` and `eps_scaling.slope` must give divisors above 0, got {min(divisors):g} in one step.",
    )

    def term(_: NoisePredictor, __: Image, step: int, ___: Condition, base_pred: Prediction) -> GuidanceTerm:
        return GuidanceTerm(eps=(1 / divisors[step] - 1) * base_pred.eps)

    return Guidance(term=term, extra_nfe=0)
