"""Classifier guidance: eq. 9 (Dhariwal & Nichol 2021)."""

from collections.abc import Callable

import torch
from torch import Tensor

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.diffusion.schedule import Schedule
from sagl.errors import UserError
from sagl.guidance.base import Guidance
from sagl.settings.guidance import ClassifierGuidance
from sagl.shapes import Image, Timestep

NoisyClassifier = Callable[[Image, Timestep], Tensor]
"""A classifier of noisy images: ((B, C, H, W), (B,) timesteps) -> (B, classes)."""


def classifier_guidance(settings: ClassifierGuidance, classifier: NoisyClassifier, schedule: Schedule) -> Guidance:
    """Towards x_t that the classifier takes for the condition's labels: score = scale · grad log p(y | x_t).

    Costs no pass of the UNet; the labels must be given.
    """

    def direction(_: NoisePredictor, x_t: Image, step: int, condition: Condition, __: Prediction) -> GuidanceTerm:
        """Scale · grad log p(y | x_t), eq. 9."""
        if condition.labels is None:
            raise UserError("`labels` must be given for classifier guidance, got none.")
        timesteps = schedule.timestep(step, len(x_t), x_t.device)
        with torch.inference_mode(False):  # switches gradients on too; enable_grad alone does nothing in inference mode
            x = x_t.detach().clone().requires_grad_()
            log_p = classifier(x, timesteps).log_softmax(dim=-1)
            chosen = log_p.gather(1, condition.labels.clone()[:, None]).sum()
            return GuidanceTerm(score=settings.scale * torch.autograd.grad(chosen, x)[0])

    return Guidance(direction=direction, when=lambda _: settings.scale != 0, passes=0)
