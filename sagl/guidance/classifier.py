"""Classifier guidance: eq. 9 (Dhariwal & Nichol 2021)."""

import torch

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.errors import UserError
from sagl.guidance.base import Guidance, GuidanceContext
from sagl.settings.guidance import ClassifierGuidance
from sagl.shapes import Image
from sagl.utils.environment import strictly_deterministic


def build_classifier_guidance(settings: ClassifierGuidance, context: GuidanceContext) -> Guidance:
    """Guide towards the condition's labels: score = scale · grad log p(y | x_t). Costs no evaluation of the UNet.

    Raises:
        UserError: the classifier cannot be loaded or does not fit the network.
    """
    assert settings.checkpoint is not None  # `check_network` requires it
    classifier, schedule = context.load_classifier(settings.checkpoint), context.schedule

    def term(_: NoisePredictor, x_t: Image, step: int, condition: Condition, __: Prediction) -> GuidanceTerm:
        """Eq. 9: the gradient of log p(y | x_t) with respect to x_t."""
        if condition.labels is None:
            raise UserError("`labels` must be given for classifier guidance, got none.")
        timesteps = schedule.timestep(step, len(x_t), x_t.device)
        # inference_mode(False) enables gradients too; enable_grad alone does nothing in inference mode
        with torch.inference_mode(False), strictly_deterministic():
            x = x_t.detach().clone().requires_grad_()
            log_p = classifier(x, timesteps).log_softmax(dim=-1)
            log_prob = log_p.gather(1, condition.labels.clone()[:, None]).sum()
            return GuidanceTerm(score=settings.scale * torch.autograd.grad(log_prob, x)[0])

    return Guidance(term=term, extra_nfe=0)
