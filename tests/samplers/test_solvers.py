"""Second-order solvers of the probability-flow ODE, against their formulas, an exact solution and diffusers."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from sagl.diffusion.predictor import Condition, Prediction, make_predictor
from sagl.diffusion.schedule import Schedule, make_schedule
from sagl.samplers.ddim import ddim
from sagl.samplers.dpm_solver import dpm_solver_pp_2m
from sagl.samplers.heun import heun
from sagl.samplers.unipc import unipc
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.networks import toy_network
from tests.helpers.predictors import NO_CONDITION, draws, forbidden_noise

SOLVERS = {"dpm++2m": dpm_solver_pp_2m, "heun": heun, "unipc": unipc}
every_solver = pytest.mark.parametrize("name", SOLVERS)
LABELS = Condition(labels=torch.tensor([1, 3]))


class ByHand:
    """Algorithms of the papers, in float64 and NumPy: `x0_hat(x, k)` is the network at step k."""

    def __init__(self, alphas_cumprod, x0_hat):
        bars = np.append(alphas_cumprod, 1.0)  # entry -1 is the clean image
        self.alpha, self.sigma, self.x0_hat = np.sqrt(bars), np.sqrt(1 - bars), x0_hat
        with np.errstate(divide="ignore"):
            self.lam = np.log(self.alpha / self.sigma)
        self.steps = list(reversed(range(len(alphas_cumprod))))

    def integral(self, x, k, x0_hat_at):
        """Exact solution from step k to k - 1 for an x0_hat that depends on lambda (Lu et al. 2022, eq. 8)."""
        start, end = self.lam[k], self.lam[k - 1]
        nodes, weights = np.polynomial.legendre.leggauss(60)
        lam = start + (end - start) * (nodes + 1) / 2
        terms = [w * np.exp(point) * x0_hat_at(point) for w, point in zip(weights, lam, strict=True)]
        return self.sigma[k - 1] / self.sigma[k] * x + self.sigma[k - 1] * (end - start) / 2 * sum(terms)

    def interpolate(self, known):
        """Lagrange's polynomial through (lambda, x0_hat)."""

        def value(lam):
            return sum(
                y * math.prod((lam - other) / (point - other) for other, _ in known if other != point)
                for point, y in known
            )

        return value

    def dpm_step(self, x, k, history):
        """Algorithm 2 of Lu et al. 2022, lines 7 and 8."""
        if len(history) == 1 or k <= 1:
            combined = history[-1]
        else:
            r = (self.lam[k] - self.lam[k + 1]) / (self.lam[k - 1] - self.lam[k])
            combined = (1 + 1 / (2 * r)) * history[-1] - 1 / (2 * r) * history[-2]
        decay = np.exp(-(self.lam[k - 1] - self.lam[k]))
        return self.sigma[k - 1] / self.sigma[k] * x - self.alpha[k - 1] * (decay - 1) * combined

    def run(self, name, x):
        """Yield x after every step."""
        history, x_start = [], x
        for k in self.steps:
            m = self.x0_hat(x, k)
            if name == "unipc" and len(history) == 1:
                x = self.integral(x_start, k + 1, lambda lam, m=m: (history[-1] + m) / 2)
            elif name == "unipc" and history:
                known = [(self.lam[k + 2], history[-2]), (self.lam[k + 1], history[-1]), (self.lam[k], m)]
                x = self.integral(x_start, k + 1, self.interpolate(known))
            history.append(m)
            x_start, x = x, self.dpm_step(x, k, history if name != "heun" else [m])
            if name == "heun" and k:
                known = [(self.lam[k], m), (self.lam[k - 1], self.x0_hat(x, k - 1))]
                x = self.integral(x_start, k, self.interpolate(known))
            yield x


@every_solver
@pytest.mark.parametrize("respacing", ["7", "1,2,3", "logsnr6", "1"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("clip_x0", "has_score"), [(False, False), (True, False), (True, True)])
def test_every_step_is_that_of_the_papers_formulas(name, respacing, kind, clip_x0, has_score):
    schedule, x = make_schedule(DiffusionSettings(noise_schedule=kind), respacing), draws(1)[0]
    base = make_predictor(toy_network, schedule, "learned_range")

    def predict(x_t, step, condition):
        return replace(base(x_t, step, condition), score=torch.cos(x_t) if has_score else 0.0)

    def x0_hat(x_t, k):
        alpha, sigma = by_hand.alpha[k], by_hand.sigma[k]
        eps = base(torch.as_tensor(x_t), k, LABELS).eps.numpy()
        result = (x_t - sigma * eps) / alpha
        result = np.clip(result, -1, 1) if clip_x0 else result
        return result + sigma**2 / alpha * np.cos(x_t) if has_score else result

    by_hand = ByHand(schedule.alphas_cumprod.numpy(), x0_hat)
    steps = SOLVERS[name](predict, x, LABELS, schedule, forbidden_noise, clip_x0=clip_x0)
    for (_, actual, _), expected in zip(steps, by_hand.run(name, x.numpy()), strict=True):
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-10 * np.abs(expected).max())


def error_on_a_gaussian(sample, num_steps, variance=0.3):
    """Error at the cleanest timestep for images of N(0, variance), whose ODE has an exact solution."""
    bars = torch.sigmoid(torch.linspace(6, -6, num_steps, dtype=torch.float64))
    schedule = Schedule(timesteps=torch.arange(num_steps), alphas_cumprod=bars)
    x_T = draws(1)[0]

    def predict(x_t, step, condition):
        bar = schedule.alpha_bar(step)
        return Prediction(eps=(1 - bar).sqrt() / (bar * variance + 1 - bar) * x_t, log_variance=torch.tensor(0.0))

    *_, (_, x, _), _ = sample(predict, x_T, NO_CONDITION, schedule, forbidden_noise, clip_x0=False)
    start, end = bars[-1] * variance + 1 - bars[-1], bars[0] * variance + 1 - bars[0]
    return float((x - (end / start).sqrt() * x_T).abs().max())


@pytest.mark.parametrize(("sample", "ratio"), [(ddim, 2), *((solver, 4) for solver in SOLVERS.values())])
def test_half_the_step_length_divides_the_error_by_2_for_ddim_and_by_4_at_least_for_the_solvers(sample, ratio):
    errors = [error_on_a_gaussian(sample, num_steps) for num_steps in (41, 81, 161)]
    ratios = [long / short for long, short in pairwise(errors)]
    assert min(ratios) > 0.9 * ratio
    assert sample is not ddim or max(ratios) < 1.1 * ratio


@every_solver
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_clipped_x0_hats_keep_the_last_image_within_range(name, kind):
    schedule, x = make_schedule(DiffusionSettings(noise_schedule=kind), "10"), draws(1)[0]
    predict = make_predictor(toy_network, schedule, "learned_range")
    *_, (_, last, _) = SOLVERS[name](predict, 9 * x, LABELS, schedule, forbidden_noise)
    assert float(last.abs().max()) <= 1


def steps_of_diffusers(scheduler_name, sample, num_steps):
    """Final images of each step of diffusers and of sagl on the same timesteps, with the toy network."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, scheduler_name)(beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.long().unique()
    schedule = Schedule(
        timesteps=timesteps, alphas_cumprod=make_schedule(DiffusionSettings()).alphas_cumprod[timesteps]
    )
    predict, x_T = make_predictor(toy_network, schedule, "learned_range"), draws(1)[0]
    actual = [x for _, x, _ in sample(predict, x_T, LABELS, schedule, forbidden_noise, clip_x0=False)]
    x, expected = x_T * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        scaled, step = scheduler.scale_model_input(x, t), int((timesteps == int(t)).nonzero())
        x = scheduler.step(predict(scaled, step, LABELS).eps, t, x).prev_sample
        expected.append(x)
    return actual, expected


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers with NumPy 2
@pytest.mark.parametrize(
    ("scheduler", "sample"),
    [("DPMSolverMultistepScheduler", dpm_solver_pp_2m), ("UniPCMultistepScheduler", unipc)],
)
def test_steps_are_those_of_diffusers_up_to_step_1(scheduler, sample):
    """Which diffusers takes by second order. Its tables are float32."""
    actual, expected = steps_of_diffusers(scheduler, sample, 12)
    for ours, theirs in zip(actual[:-2], expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_heun_converges_to_the_images_of_diffusers():
    """Which averages eps where sagl averages x0_hat: another method of second order."""
    few, many = (steps_of_diffusers("HeunDiscreteScheduler", heun, num_steps) for num_steps in (25, 100))
    few, many = (float((actual[-1] - expected[-1]).abs().mean()) for actual, expected in (few, many))
    assert many < few / 12
