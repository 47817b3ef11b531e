"""DDIM (Song et al. 2021), any eta, with ADM's clipping and classifier term."""

from collections.abc import Iterator

from sagl.diffusion.noise import StepNoise
from sagl.diffusion.predictor import Condition, NoisePredictor, Prediction
from sagl.diffusion.process import eps_from_x0_hat, maybe_clip, x0_hat_from_eps
from sagl.diffusion.schedule import Schedule
from sagl.shapes import Image


def ddim_step(
    x: Image,
    prediction: Prediction,
    schedule: Schedule,
    step: int,
    noise: StepNoise,
    *,
    clip_x0: bool = True,
    eta: float = 0.0,
) -> Image:
    """x_{t-1} from x_t (Song et al. 2021, eq. 12, 16): eta 0 is deterministic, eta 1 ancestral.

    eps is derived again from the clipped x0_hat; the score shifts it (eq. 9), and x0_hat is not clipped again.
    (B, C, H, W) -> the same.
    """
    alpha_bar, before = schedule.alpha_bar(step), schedule.alpha_bar(step - 1)
    x0_hat = maybe_clip(x0_hat_from_eps(x, prediction.eps, alpha_bar), clip_x0)
    eps = eps_from_x0_hat(x, x0_hat, alpha_bar) - (1 - alpha_bar).sqrt().to(x) * prediction.score
    x0_hat = x0_hat_from_eps(x, eps, alpha_bar)
    sigma = eta * ((1 - before) / (1 - alpha_bar) * (1 - alpha_bar / before)).sqrt()
    mean = before.sqrt().to(x) * x0_hat + (1 - before - sigma**2).sqrt().to(x) * eps
    return mean + sigma.to(x) * noise(step) if step and eta else mean


def ddim(
    denoise: NoisePredictor,
    x: Image,
    condition: Condition,
    schedule: Schedule,
    noise: StepNoise,
    *,
    clip_x0: bool = True,
    eta: float = 0.0,
) -> Iterator[tuple[int, Image, Prediction]]:
    """The chain from x_T: yields (step, x after it, the prediction behind it), the noisiest step first.

    Args:
        denoise: guided or plain.
        x: (B, C, H, W), x_T.
        condition: what every evaluation is told.
        schedule: the chain's steps.
        noise: what a step draws, by step; not called at eta 0.
        clip_x0: clip the guided x0_hat to [-1, 1].
        eta: share of the ancestral noise, at least 0.
    """
    for step in reversed(range(schedule.num_steps)):
        prediction = denoise(x, step, condition)
        x = ddim_step(x, prediction, schedule, step, noise, clip_x0=clip_x0, eta=eta)
        yield step, x, prediction
