import numpy as np
import pytest
import torch

from sagl.diffusion.process import (
    add_noise,
    eps_from_x0_hat,
    interpolate_log_variance,
    posterior_mean,
    x0_hat_from_eps,
)
from sagl.diffusion.schedule import make_schedule
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers import formulas

STEPS = [0, 1, 7, 19]


def process_of(kind="linear"):
    schedule = make_schedule(DiffusionSettings(noise_schedule=kind), "20")
    return schedule, formulas.Process(kind, schedule.timesteps.tolist())


def images(count=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 5, 6, generator=g).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("step", STEPS)
def test_adding_noise_x0_hat_and_eps_invert_each_other(step):
    x_0, noise = images()
    bar = process_of()[0].alpha_bar(step)
    x_t = add_noise(x_0, noise, bar)
    torch.testing.assert_close(x0_hat_from_eps(x_t, noise, bar), x_0, rtol=0, atol=1e-10)
    torch.testing.assert_close(eps_from_x0_hat(x_t, x_0, bar), noise, rtol=0, atol=1e-10)


def test_noised_images_are_the_weighted_sum():
    x_0, noise = images()
    bar = torch.tensor(0.36, dtype=torch.float64)
    torch.testing.assert_close(add_noise(x_0, noise, bar), 0.6 * x_0 + 0.8 * noise)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("step", STEPS)
def test_posterior_mean_is_that_of_bayes_rule(kind, step):
    """Precisions add: x_t = sqrt(alpha) x_prev + noise of variance beta, x_prev of mean sqrt(bar_prev) x_0."""
    x_0, x_t = images()
    schedule, tables = process_of(kind)
    actual = posterior_mean(x_0, x_t, schedule.alpha_bar(step), schedule.alpha_bar(step - 1))
    if step == 0:
        expected = x_0
    else:
        beta, bar_prev = tables.beta[step], tables.bar_prev[step]
        precision = (1 - beta) / beta + 1 / (1 - bar_prev)
        expected = (np.sqrt(1 - beta) / beta * x_t + np.sqrt(bar_prev) / (1 - bar_prev) * x_0) / precision
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


def test_learned_variance_goes_from_the_posteriors_to_beta_in_log_space():
    low, high = torch.tensor(-4.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    actual = interpolate_log_variance(torch.tensor([-1.0, 0.0, 1.0, 3.0]), low, high)
    torch.testing.assert_close(actual, torch.tensor([-4.0, -3.5, -3.0, -2.0]))


def test_x0_hat_is_clipped_on_request():
    x_t, eps, bar = torch.tensor([-1.5, -0.25, 0.25, 1.5]), torch.zeros(4), torch.tensor(0.25, dtype=torch.float64)
    assert x0_hat_from_eps(x_t, eps, bar).tolist() == [-3.0, -0.5, 0.5, 3.0]
    assert x0_hat_from_eps(x_t, eps, bar, clip=True).tolist() == [-1.0, -0.5, 0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_float64_coefficients_keeps_the_images_dtype(dtype):
    schedule, steps = process_of()[0], torch.tensor(STEPS)
    x, y = images(dtype=dtype)
    bar, bar_prev = schedule.alpha_bar(steps), schedule.alpha_bar(steps - 1)
    variances = schedule.log_posterior_variance(steps), schedule.log_beta(steps)
    images_out = [add_noise(x, y, bar), x0_hat_from_eps(x, y, bar), eps_from_x0_hat(x, y, bar)]
    images_out += [posterior_mean(x, y, bar, bar_prev), interpolate_log_variance(x, *variances)]
    assert {image.dtype for image in images_out} == {dtype}


@pytest.mark.parametrize("process", [add_noise, x0_hat_from_eps, eps_from_x0_hat])
def test_every_sample_of_a_batch_has_its_own_coefficient(process):
    schedule, (x, y) = process_of()[0], images()
    together = process(x, y, schedule.alpha_bar(torch.tensor(STEPS)))
    for row, step in enumerate(STEPS):
        torch.testing.assert_close(together[row], process(x[row], y[row], schedule.alpha_bar(step)), rtol=0, atol=0)
