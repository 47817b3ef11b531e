"""Ancestral sampling (Ho et al. 2020, algorithm 2), with ADM's clipping and classifier term."""

from collections.abc import Iterator

from sagl.diffusion.noise import StepNoise
from sagl.diffusion.predictor import Condition, NoisePredictor, Prediction
from sagl.diffusion.process import maybe_clip, posterior_mean, x0_hat_from_eps
from sagl.diffusion.schedule import Schedule
from sagl.shapes import Image


def ddpm_step(
    x: Image, prediction: Prediction, schedule: Schedule, step: int, noise: StepNoise, *, clip_x0: bool = True
) -> Image:
    """x_{t-1} from x_t (eq. 4, 7): the posterior mean of x0_hat, moved by variance · score (eq. 9), plus noise.

    No noise at step 0. (B, C, H, W) -> the same.
    """
    alpha_bar, before = schedule.alpha_bar(step), schedule.alpha_bar(step - 1)
    x0_hat = maybe_clip(x0_hat_from_eps(x, prediction.eps, alpha_bar), clip_x0)
    mean = posterior_mean(x0_hat, x, alpha_bar, before) + prediction.log_variance.exp() * prediction.score
    return mean + (0.5 * prediction.log_variance).exp() * noise(step) if step else mean


def ddpm(
    denoise: NoisePredictor,
    x: Image,
    condition: Condition,
    schedule: Schedule,
    noise: StepNoise,
    *,
    clip_x0: bool = True,
) -> Iterator[tuple[int, Image, Prediction]]:
    """The chain from x_T: yields (step, x after it, the prediction behind it), the noisiest step first.

    Args:
        denoise: guided or plain.
        x: (B, C, H, W), x_T.
        condition: what every evaluation is told.
        schedule: the chain's steps.
        noise: what a step draws, by step.
        clip_x0: clip the guided x0_hat to [-1, 1]; Algorithm 1 does not, the released code does.
    """
    for step in reversed(range(schedule.num_steps)):
        prediction = denoise(x, step, condition)
        x = ddpm_step(x, prediction, schedule, step, noise, clip_x0=clip_x0)
        yield step, x, prediction
