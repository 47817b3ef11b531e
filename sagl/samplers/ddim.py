"""DDIM (Song et al. 2021) for any eta, with ADM's clip and classifier score."""

from sagl.diffusion.noise import StepNoise
from sagl.diffusion.predictor import Condition, NoisePredictor, Prediction, Trajectory
from sagl.diffusion.process import cast_like, eps_from_x0_hat, x0_hat_from_eps
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
    """Compute x_{t-1} from x_t (Song et al. 2021, eq. 12, 16): eta 0 is deterministic, eta 1 ancestral.

    eps is derived again from the clipped x0_hat. The score shifts it (eq. 9); x0_hat is not clipped after that.
    """
    alpha_bar, alpha_bar_prev = schedule.alpha_bar(step), schedule.alpha_bar(step - 1)
    x0_hat = x0_hat_from_eps(x, prediction.eps, alpha_bar, clip=clip_x0)
    eps = eps_from_x0_hat(x, x0_hat, alpha_bar) - cast_like((1 - alpha_bar).sqrt(), x) * prediction.score
    x0_hat = x0_hat_from_eps(x, eps, alpha_bar)
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
    mean = cast_like(alpha_bar_prev.sqrt(), x) * x0_hat + cast_like((1 - alpha_bar_prev - sigma**2).sqrt(), x) * eps
    return mean + cast_like(sigma, x) * noise(step) if step and eta else mean


def ddim(
    predict: NoisePredictor,
    x: Image,
    condition: Condition,
    schedule: Schedule,
    noise: StepNoise,
    *,
    clip_x0: bool = True,
    eta: float = 0.0,
) -> Trajectory:
    """Sample from x_T: yields (step, x after the step, the step's prediction), the noisiest step first.

    Arguments are those of `ddpm`. `eta`, at least 0, is the fraction of the ancestral noise; at 0, no noise is drawn.
    """
    for step in reversed(range(schedule.num_steps)):
        prediction = predict(x, step, condition)
        x = ddim_step(x, prediction, schedule, step, noise, clip_x0=clip_x0, eta=eta)
        yield step, x, prediction
