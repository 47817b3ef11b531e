"""UniPC (Zhao et al. 2023, arXiv 2302.04867) with second-order predictor and corrector, one evaluation per step."""

from collections.abc import Sequence

from sagl.diffusion.noise import StepNoise
from sagl.diffusion.predictor import Condition, NoisePredictor, Trajectory
from sagl.diffusion.process import cast_like
from sagl.diffusion.schedule import Schedule
from sagl.samplers.dpm_solver import dpm_solver_step
from sagl.samplers.ode import guided_x0_hat, mean_position, ode_step, step_length
from sagl.shapes import Image


def unic_step(x: Image, x0_hats: Sequence[Image], next_x0_hat: Image, schedule: Schedule, step: int) -> Image:
    """Compute x_{t-1} from x_t again, now that x0_hat is known at both ends of the step (UniC-2, algorithm 1).

    x0_hat is the quadratic in lambda through the last three; UniC's weights make the step exact for it. The first step
    has no earlier x0_hat and takes the mean of both ends (UniC-1).
    """
    *earlier, x0_hat = x0_hats
    change = next_x0_hat - x0_hat
    if not earlier:
        return ode_step(x, x0_hat + change / 2, schedule, step)
    h, previous_h = step_length(schedule, step), step_length(schedule, step + 1)
    position = mean_position(h)
    curvature = change - cast_like(h / previous_h, x) * (x0_hat - earlier[-1])
    curvature_weight = (2 * position - 1) / (h + previous_h)
    combined = x0_hat + cast_like(position, x) * change - cast_like(curvature_weight, x) * curvature
    return ode_step(x, combined, schedule, step)


def unipc(
    predict: NoisePredictor,
    x: Image,
    condition: Condition,
    schedule: Schedule,
    noise: StepNoise,
    *,
    clip_x0: bool = True,
) -> Trajectory:
    """Sample from x_T: yields (step, x after the step, the step's prediction), the noisiest step first.

    The predictor UniP-2 with B(h) = e^h - 1 is DPM-Solver++(2M)'s step. The network is evaluated where it leads; the
    corrector then repeats the last step with this x0_hat, and the next step starts from there.

    Arguments are those of `ddpm`. `noise` is not called. x0_hats are clipped before they are combined, not after it.
    """
    x_start = x
    x0_hats: list[Image] = []  # at most the last two
    for step in reversed(range(schedule.num_steps)):
        prediction = predict(x, step, condition)
        x0_hat = guided_x0_hat(x, prediction, schedule, step, clip_x0=clip_x0)
        if x0_hats:
            x = unic_step(x_start, x0_hats, x0_hat, schedule, step + 1)
        x_start, x0_hats = x, [*x0_hats[-1:], x0_hat]
        x = dpm_solver_step(x_start, x0_hats, schedule, step)
        yield step, x, prediction
