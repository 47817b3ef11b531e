"""Ancestral sampling (Ho et al. 2020, algorithm 2), with ADM's clip and classifier score."""

from sagl.diffusion.noise import StepNoise
from sagl.diffusion.predictor import Condition, NoisePredictor, Prediction, Trajectory
from sagl.diffusion.process import posterior_mean, x0_hat_from_eps
from sagl.diffusion.schedule import Schedule
from sagl.shapes import Image


def ddpm_step(
    x: Image, prediction: Prediction, schedule: Schedule, step: int, noise: StepNoise, *, clip_x0: bool = True
) -> Image:
    """Compute x_{t-1} from x_t (eq. 4, 7): the posterior mean of x0_hat plus variance · score (eq. 9), plus noise.

    Step 0 adds no noise.
    """
    alpha_bar, alpha_bar_prev = schedule.alpha_bar(step), schedule.alpha_bar(step - 1)
    x0_hat = x0_hat_from_eps(x, prediction.eps, alpha_bar, clip=clip_x0)
    mean = posterior_mean(x0_hat, x, alpha_bar, alpha_bar_prev) + prediction.log_variance.exp() * prediction.score
    return mean + (0.5 * prediction.log_variance).exp() * noise(step) if step else mean


def ddpm(
    predict: NoisePredictor,
    x: Image,
    condition: Condition,
    schedule: Schedule,
    noise: StepNoise,
    *,
    clip_x0: bool = True,
) -> Trajectory:
    """Sample from x_T: yields (step, x after the step, the step's prediction), the noisiest step first.

    Args:
        predict: the network, with or without guidance.
        x: (B, C, H, W), x_T.
        condition: condition of every evaluation.
        schedule: the sampler's steps.
        noise: noise of a step.
        clip_x0: clip the guided x0_hat to [-1, 1], as the released code does; Algorithm 1 does not.
    """
    for step in reversed(range(schedule.num_steps)):
        prediction = predict(x, step, condition)
        x = ddpm_step(x, prediction, schedule, step, noise, clip_x0=clip_x0)
        yield step, x, prediction
