import math

import numpy as np
import pytest
import torch

from sagl.diffusion.likelihood import (
    bits_per_dim,
    discretized_log_likelihood,
    estimated_bits_per_dim,
    gaussian_kl,
    prior_bits,
    sample_vlb_timesteps,
)
from sagl.diffusion.predictor import Condition, Prediction, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers import formulas
from tests.helpers.networks import toy_model, toy_network
from tests.helpers.predictors import pixels, standard_normal
from tests.helpers.reference_values import REFERENCE_LABELS, generator, loss_inputs, network, schedule_of, values

CLOSE = {"rtol": 1e-4, "atol": 0}


@pytest.mark.parametrize("name", REFERENCE_LABELS)
def test_bits_per_dim_equal_the_reference_values(name):
    x_0, _ = loss_inputs()
    schedule, g = schedule_of(name, "20"), generator(78)
    predict = make_predictor(network(name), schedule, "learned_range")
    noise = {step: torch.randn(3, 3, 32, 32, generator=g) for step in reversed(range(20))}
    actual = bits_per_dim(predict, x_0, schedule, noise.__getitem__, Condition(labels=REFERENCE_LABELS[name]))
    expected = {field: values("losses")[f"{name}.bpd.{field}"] for field in ("total", "vb", "prior")}
    torch.testing.assert_close(actual.total, expected["total"], **CLOSE)
    torch.testing.assert_close(actual.prior, expected["prior"], **CLOSE)
    # terms below 1e-4 are rounded at 1e-8 in the reference itself, which is float32 throughout
    torch.testing.assert_close(actual.vlb_terms, expected["vb"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_bits_per_dim_are_those_of_an_independent_implementation(clip_x0, variance):
    schedule = make_schedule(DiffusionSettings(noise_schedule="cosine"), "ddim10")
    process = formulas.Process("cosine", schedule.timesteps.tolist())
    x_0, noise = pixels(), [standard_normal(seed=step) for step in range(10)]
    predict = make_predictor(toy_network, schedule, variance)
    actual = bits_per_dim(predict, x_0, schedule, noise.__getitem__, clip_x0=clip_x0)
    for column, step in enumerate(reversed(range(10))):
        x = math.sqrt(process.bar[step]) * x_0 + math.sqrt(1 - process.bar[step]) * noise[step]
        t = torch.full((3,), int(process.timesteps[step]))
        eps, fraction = (part.numpy() for part in toy_model(x, t).chunk(2, dim=1))
        log_variance = process.log_variance(step, variance, fraction)
        expected = process.bound(x_0.numpy(), x.numpy(), eps, log_variance, step, clip_x0)
        np.testing.assert_allclose(actual.vlb_terms[:, column].numpy(), expected, rtol=1e-6)
    torch.testing.assert_close(actual.total, actual.vlb_terms.sum(dim=1) + actual.prior, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_very_small_prior_is_precise(dtype, kind):
    schedule, x_0 = make_schedule(DiffusionSettings(noise_schedule=kind)), pixels()
    bar = float(schedule.alphas_cumprod[-1])
    expected = 0.5 * (-math.log1p(-bar) - bar + bar * x_0**2).flatten(1).mean(dim=1) / math.log(2)
    torch.testing.assert_close(prior_bits(x_0.to(dtype), schedule).double(), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kl_of_nearly_equal_gaussians_is_precise(dtype):
    mean, log_variance = torch.tensor([1e-4, 0.0, 0.3, -1.0]), torch.tensor([-6.0, -2.002, -3.0, 1.0])
    other = torch.tensor([-6.0, -2.0, -2.5, 0.0])
    d = log_variance.double() - other.double()
    expected = 0.5 * (torch.expm1(d) - d + mean.double() ** 2 * torch.exp(-other.double()))
    actual = gaussian_kl(mean.to(dtype), log_variance.to(dtype), torch.zeros(4, dtype=dtype), other.to(dtype))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=0)


def test_the_true_noise_with_the_posteriors_variance_costs_the_decoder_term_alone():
    schedule, x_0, noise = make_schedule(DiffusionSettings(), "10"), pixels(), standard_normal()

    def predict(x_t, step, condition):
        return Prediction(eps=noise, log_variance=schedule.log_posterior_variance(step))

    actual = bits_per_dim(predict, x_0, schedule, lambda step: noise)
    assert float(actual.vlb_terms[:, :-1].abs().max()) < 1e-9
    assert float(actual.vlb_terms[:, -1].min()) > 0


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_the_mean_of_the_estimates_over_all_timesteps_is_the_whole_bound(variance):
    schedule, x_0 = make_schedule(DiffusionSettings(num_timesteps=40)), pixels()
    noise = [standard_normal(seed=step) for step in range(40)]
    expected = bits_per_dim(make_predictor(toy_network, schedule, variance), x_0, schedule, noise.__getitem__)
    prior, weights = prior_bits(x_0, schedule), torch.full((3,), 5.0)
    terms = []
    for step in range(40):
        steps = torch.full((3,), step)
        estimate = estimated_bits_per_dim(toy_model, x_0, steps, weights, noise[step], schedule, variance=variance)
        terms.append(estimate - prior)
    torch.testing.assert_close(sum(terms) / 5 + prior, expected.total, rtol=1e-6, atol=0)


def test_timesteps_of_the_estimate_have_the_probability_that_their_weights_imply():
    timesteps, weights = sample_vlb_timesteps([np.random.default_rng(0)] * 40_000, 20)
    frequency = torch.bincount(timesteps, minlength=20) / len(timesteps)
    expected = torch.stack([1 / weights[timesteps == t][0] for t in range(20)])
    assert float(expected.sum()) == pytest.approx(1)
    torch.testing.assert_close(frequency, expected, rtol=0.1, atol=0)
    assert float(expected[0]) > 5 * float(expected[-1])


@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.002, 0.7, 1.0])
@pytest.mark.parametrize("log_scale", [-6.0, -3.0, 0.0, 2.0])
def test_probabilities_of_all_256_values_of_a_pixel_sum_to_one(mean, log_scale):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_p = discretized_log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, log_scale))
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_a_pixel_is_likeliest_at_the_mean_and_by_the_normal_density_times_the_width():
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_p = discretized_log_likelihood(x, x[100].expand(256), torch.full_like(x, -2.0))
    assert int(log_p.argmax()) == 100
    density = -0.5 * ((x - x[100]) / math.exp(-2)) ** 2 + 2 - 0.5 * math.log(2 * math.pi) + math.log(2 / 255)
    torch.testing.assert_close(log_p[60:140], density[60:140], rtol=0, atol=0.05)
