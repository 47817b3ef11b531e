"""Heun's method for the probability-flow ODE: second order, two evaluations per step but the last."""

from dataclasses import replace

from sagl.diffusion.noise import StepNoise
from sagl.diffusion.predictor import Condition, NoisePredictor, Trajectory
from sagl.diffusion.process import cast_like
from sagl.diffusion.schedule import Schedule
from sagl.samplers.ode import guided_x0_hat, mean_position, ode_step, step_length
from sagl.shapes import Image


def heun(
    predict: NoisePredictor,
    x: Image,
    condition: Condition,
    schedule: Schedule,
    noise: StepNoise,
    *,
    clip_x0: bool = True,
) -> Trajectory:
    """Sample from x_T: yields (step, x after the step, the step's prediction), the noisiest step first.

    A step is taken with x0_hat, and again with x0_hat linear in lambda between both ends of the step (Hochbruck &
    Ostermann 2010, exponential Runge-Kutta methods of order 2). Karras et al. 2022 (algorithm 1) average eps over
    sigma / alpha instead. This fails on the cosine schedule, where sigma / alpha falls from 20,000 to 6 in the first of
    ten steps: errors of eps are multiplied by the difference.

    Arguments are those of `ddpm`. `noise` is not called. A step's second evaluation is at the next step.
    """
    for step in reversed(range(schedule.num_steps)):
        prediction = predict(x, step, condition)
        x0_hat = guided_x0_hat(x, prediction, schedule, step, clip_x0=clip_x0)
        x_next, nfe = ode_step(x, x0_hat, schedule, step), prediction.nfe
        if step:
            end_prediction = predict(x_next, step - 1, condition)
            end_x0_hat = guided_x0_hat(x_next, end_prediction, schedule, step - 1, clip_x0=clip_x0)
            position = cast_like(mean_position(step_length(schedule, step)), x)
            x_next = ode_step(x, x0_hat + position * (end_x0_hat - x0_hat), schedule, step)
            nfe += end_prediction.nfe
        x = x_next
        yield step, x, replace(prediction, nfe=nfe)
