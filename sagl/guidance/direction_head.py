"""Guidance by a direction head: eps - eps of the weak prediction, learned from the base evaluation.

At a fixed x_t the term of a method is linear in its scale, s · (eps - eps'), so that a head that knows the direction
serves every scale, interval and shape. Distillation into the network itself needs s as an input: AGD for
classifier-free guidance, arXiv 2503.07274.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.diffusion.process import cast_like
from sagl.diffusion.schedule import Schedule
from sagl.guidance.base import Guidance, GuidanceContext, MaskOfStep
from sagl.guidance.sag import blur_x0_hat
from sagl.guidance.shaping import DEFAULT_SIGMA
from sagl.settings.guidance import BlurGuidance, GuidanceSettings
from sagl.settings.network import UNetSettings
from sagl.shapes import Image

HeadInputs = Callable[[Image, int, Condition, Prediction], Tensor]
"""(x_t, step, condition, base prediction) -> image inputs of a head, (B, image_channels, H, W)."""


def use_head(guidance: Guidance, settings: GuidanceSettings, context: GuidanceContext) -> Guidance:
    """Replace the term of a guidance by s · h, without a further evaluation.

    With `renew_every` k above 1, every k-th guided step has the method's own term, from the noisiest step on.

    Raises:
        UserError: the head cannot be loaded, or belongs to other settings or another network.
    """
    head, schedule = context.load_head(settings, guidance.mask is not None), context.schedule
    network_settings = context.network_settings
    inputs_of = head_inputs(guidance.mask, settings, schedule)
    guided = [step for step in reversed(range(schedule.num_steps)) if guidance.is_active(step)]
    renewed = set(guided[:: settings.renew_every]) if settings.renew_every > 1 else set()

    def term(
        predict: NoisePredictor, x_t: Image, step: int, condition: Condition, base_pred: Prediction
    ) -> GuidanceTerm:
        """Return s · h(inputs, t), or in renewed steps the method's own term."""
        if step in renewed:
            return guidance.term(predict, x_t, step, condition, base_pred)
        images, maps = inputs_of(x_t, step, condition, base_pred), head_maps(base_pred, network_settings)
        direction = head(images, maps, schedule.timestep(step, len(x_t), x_t.device))
        extras = {"mask": images[:, -1:]} if guidance.mask else {}
        return GuidanceTerm(eps=settings.scale * direction, extras=extras)

    def prepare_condition(condition: Condition) -> Condition:
        return request_maps(guidance.prepare_condition(condition), network_settings)

    return replace(
        guidance, term=term, prepare_condition=prepare_condition, evaluates_term=lambda step: step in renewed
    )


def request_maps(condition: Condition, settings: UNetSettings) -> Condition:
    """Return the condition of an evaluation that also returns the feature maps of `head_maps`."""
    return replace(condition, features=True, block_inputs=(*condition.block_inputs, *settings.coarse_blocks))


def head_maps(base_pred: Prediction, settings: UNetSettings) -> list[Tensor]:
    """Return the feature maps that a head reads, one per resolution, the coarsest first.

    They are the inputs of `settings.coarse_blocks`, before the skip connection, and of the last convolution.
    """
    assert base_pred.features is not None  # `request_maps` requests them
    return [*(base_pred.block_inputs[name] for name in settings.coarse_blocks), base_pred.features]


def head_inputs(mask_of: MaskOfStep | None, settings: GuidanceSettings, schedule: Schedule) -> HeadInputs:
    """Return the function that computes the image inputs of a head from a step.

    They are x_t, x0_hat and k (x0_hat - blur(x0_hat)) with k = sqrt(alpha_bar / (1 - alpha_bar)), which is the size of
    a change of x0_hat as a change of eps. A method with a mask adds that part inside of its mask, and the mask.
    """
    blur_settings = settings if isinstance(settings, BlurGuidance) else BlurGuidance(blur_sigma=DEFAULT_SIGMA)

    def inputs(x_t: Image, step: int, condition: Condition, base_pred: Prediction) -> Tensor:
        """Return the inputs side by side: (B, 9 or 13 channels of RGB images, H, W)."""
        alpha_bar = schedule.alpha_bar(step)
        x0_hat, x0_blurred = blur_x0_hat(x_t, base_pred.eps, alpha_bar, blur_settings)
        high_pass = cast_like((alpha_bar / (1 - alpha_bar)).sqrt(), x_t) * (x0_hat - x0_blurred)
        images = [x_t, x0_hat, high_pass]
        if mask_of is not None:
            mask = mask_of(x_t, step, condition, base_pred).to(x_t.dtype)
            images += [mask * high_pass, mask]
        return torch.cat(images, dim=1)

    return inputs
