"""Self-attention guidance: Algorithm 1 of Hong et al."""

from dataclasses import replace

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.diffusion.process import clip, x0_hat_from_eps
from sagl.diffusion.schedule import Schedule
from sagl.guidance.base import Guidance, extrapolate, within
from sagl.guidance.blur import gaussian_blur
from sagl.guidance.degrade import degrade
from sagl.guidance.mask import attention_mask
from sagl.settings.guidance import SelfAttentionGuidance, effective_kernel_size
from sagl.shapes import AttentionSite, Image, Mask


def sag(settings: SelfAttentionGuidance, schedule: Schedule) -> Guidance:
    """Away from the prediction for x_t with its most attended details blurred (eq. 16, 17).

    Costs one more pass a guided step; none at scale 0 or outside the interval. The mask, (B, 1, H, W) bool, is in
    the direction's notes.
    """
    site = AttentionSite(settings.site, settings.heads)

    def weakened(x_t: Image, step: int, plain: Prediction) -> tuple[Image, Mask]:
        """x_t_degraded (eq. 16) and what is masked of it."""
        alpha_bar, size = schedule.alpha_bar(step), (x_t.shape[-2], x_t.shape[-1])
        mask = attention_mask(plain.attention[site], settings.threshold, size)
        x0_hat = clip(x0_hat_from_eps(x_t, plain.eps, alpha_bar), settings.clip_x0)
        x0_blurred = gaussian_blur(x0_hat, effective_kernel_size(settings.kernel_size, min(size)), settings.blur_sigma)
        return degrade(x0_hat, x0_blurred, mask, plain.eps, alpha_bar), mask

    def direction(
        denoise: NoisePredictor, x_t: Image, step: int, condition: Condition, plain: Prediction
    ) -> GuidanceTerm:
        """S · (eps - eps of x_t_degraded), eq. 17."""
        x_t_degraded, mask = weakened(x_t, step, plain)  # and nothing else lives through the second pass
        weak = denoise(x_t_degraded, step, replace(condition, degraded=True))
        return replace(extrapolate(weak, plain, settings.scale), notes={"mask": mask})

    def ask(condition: Condition) -> Condition:
        return replace(condition, attention_sites=(*condition.attention_sites, site))

    guidance = Guidance(direction=direction, ask=ask, when=lambda _: settings.scale != 0)
    return within(guidance, settings.interval, schedule.num_steps)
