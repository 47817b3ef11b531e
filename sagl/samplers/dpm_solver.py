"""DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order, one evaluation per step."""

from collections.abc import Sequence

from sagl.diffusion.noise import StepNoise
from sagl.diffusion.predictor import Condition, NoisePredictor, Trajectory
from sagl.diffusion.process import cast_like
from sagl.diffusion.schedule import Schedule
from sagl.samplers.ode import guided_x0_hat, ode_step, step_length
from sagl.shapes import Image


def dpm_solver_step(x: Image, x0_hats: Sequence[Image], schedule: Schedule, step: int) -> Image:
    """Compute x_{t-1} from x_t, with x0_hat extrapolated from the last two to the middle of the step in lambda.

    Steps 1 and 0, and the first one, for which there is no earlier x0_hat, are of first order. The paper's last step,
    of first order too, is step 1. Among evenly spaced timesteps it is by far the longest in lambda, so that an
    extrapolation would amplify errors.
    """
    *earlier, x0_hat = x0_hats
    if not earlier or step <= 1:
        return ode_step(x, x0_hat, schedule, step)
    weight = step_length(schedule, step) / step_length(schedule, step + 1) / 2
    return ode_step(x, x0_hat + cast_like(weight, x) * (x0_hat - earlier[-1]), schedule, step)


def dpm_solver_pp_2m(
    predict: NoisePredictor,
    x: Image,
    condition: Condition,
    schedule: Schedule,
    noise: StepNoise,
    *,
    clip_x0: bool = True,
) -> Trajectory:
    """Sample from x_T: yields (step, x after the step, the step's prediction), the noisiest step first.

    Arguments are those of `ddpm`. `noise` is not called. x0_hat is clipped before the extrapolation, not after it.
    """
    x0_hats: list[Image] = []  # at most the last two
    for step in reversed(range(schedule.num_steps)):
        prediction = predict(x, step, condition)
        x0_hats = [*x0_hats[-1:], guided_x0_hat(x, prediction, schedule, step, clip_x0=clip_x0)]
        x = dpm_solver_step(x, x0_hats, schedule, step)
        yield step, x, prediction
