"""Parts that the solvers of the probability-flow ODE share (Lu et al. 2022, arXiv 2211.01095, section 3.3).

The ODE is integrated over lambda = log(alpha / sigma), half of the log signal-to-noise ratio. With a constant x0_hat a
step is exact, and is DDIM's at eta 0. Each solver takes that step with a combination of x0_hats.
"""

import torch
from torch import Tensor

from sagl.diffusion.predictor import Prediction
from sagl.diffusion.process import cast_like, x0_hat_from_eps
from sagl.diffusion.schedule import Schedule
from sagl.shapes import Image


def guided_x0_hat(x: Image, prediction: Prediction, schedule: Schedule, step: int, *, clip_x0: bool) -> Image:
    """Return x0_hat, clipped and then shifted by the score, which is eq. 9 in terms of x0_hat; not clipped again."""
    alpha_bar = schedule.alpha_bar(step)
    x0_hat = x0_hat_from_eps(x, prediction.eps, alpha_bar, clip=clip_x0)
    return x0_hat + cast_like((1 - alpha_bar) / alpha_bar.sqrt(), x) * prediction.score


def ode_step(x: Image, x0_hat: Image, schedule: Schedule, step: int) -> Image:
    """Compute x_{t-1} from x_t for a constant x0_hat; at step 0, x0_hat itself (Lu et al. 2022, eq. 9 with k = 1)."""
    alpha_bar, alpha_bar_prev = schedule.alpha_bar(step), schedule.alpha_bar(step - 1)
    sigma_ratio = ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt()
    x0_weight = alpha_bar_prev.sqrt() - sigma_ratio * alpha_bar.sqrt()
    return cast_like(sigma_ratio, x) * x + cast_like(x0_weight, x) * x0_hat


def step_length(schedule: Schedule, step: int) -> Tensor:
    """Return h = lambda_{t-1} - lambda_t: () float64, infinite at step 0."""
    alpha_bar, alpha_bar_prev = schedule.alpha_bar(step), schedule.alpha_bar(step - 1)
    return (alpha_bar_prev / alpha_bar * (1 - alpha_bar) / (1 - alpha_bar_prev)).log() / 2


def mean_position(h: Tensor) -> Tensor:
    """Return where in a step of length h the weight of x0_hat lies on average: from 1/2 (short) to 1 (long).

    The exact solution weights x0_hat at lambda + u h, u in [0, 1], in proportion to exp(u h).
    """
    return -1 / torch.expm1(-h) - 1 / h
