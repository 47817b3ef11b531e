"""Time-step guidance: Sadat et al. 2024, arXiv 2407.02687."""

from dataclasses import replace

from sagl.diffusion.noise import guidance_rngs, randn
from sagl.diffusion.predictor import Condition
from sagl.diffusion.process import cast_like
from sagl.guidance.base import Guidance, GuidanceContext, guide_by_condition
from sagl.settings.guidance import TimestepGuidance
from sagl.shapes import Image
from sagl.utils.prefetch import to_device


def build_tsg(settings: TimestepGuidance, context: GuidanceContext) -> Guidance:
    """Guide away from the prediction with a noisy timestep embedding: eps + s (eps - eps').

    In eps', the embedding e of the timestep is e + a t^b std(e) n, with n ~ N(0, I) of each sample and step, and the
    time t in [0, 1): section 5 and figure 12 of the paper, where a is s, b is alpha, and the scale is w - 1. Its limits
    of t are `interval`. A guided step costs one more network evaluation.
    """
    dim = 4 * context.network_settings.num_channels

    def perturbed(x_t: Image, step: int, condition: Condition) -> Condition:
        time = context.schedule.timesteps[step].double() / context.diffusion.num_timesteps
        noise = to_device(randn(guidance_rngs(condition.samples, settings.group, step), (dim,)), x_t.device)
        factor = settings.noise_scale * time**settings.noise_exponent
        return replace(condition, timestep_noise=cast_like(factor, noise) * noise)

    return guide_by_condition(settings.scale, perturbed)
