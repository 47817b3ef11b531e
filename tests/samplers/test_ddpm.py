import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sagl.diffusion.predictor import Condition, Prediction, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.samplers.ddpm import ddpm, ddpm_step
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers import formulas
from tests.helpers.networks import toy_network
from tests.helpers.predictors import NO_CONDITION, draws, forbidden_noise, linear_predictor
from tests.helpers.reference_values import trajectory_error, trajectory_names

SCHEDULE = make_schedule(DiffusionSettings(), "5")


@pytest.mark.parametrize("name", trajectory_names("ddpm"))
def test_trajectory_equals_the_reference_values_at_every_step(name):
    assert max(trajectory_error(name, ddpm)) < 1e-3


@pytest.mark.parametrize("respacing", ["7", "ddim10", "1,2,3", "1"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("has_score", [False, True])
def test_every_step_is_that_of_an_independent_implementation(respacing, kind, variance, clip_x0, has_score):
    schedule = make_schedule(DiffusionSettings(noise_schedule=kind), respacing)
    process = formulas.Process(kind, schedule.timesteps.tolist())
    x, noise = draws(schedule.num_steps)
    labels = torch.tensor([1, 3])
    base = make_predictor(toy_network, schedule, variance)

    def predict(x_t, step, condition):
        return replace(base(x_t, step, condition), score=torch.cos(x_t) if has_score else 0.0)

    expected = x.numpy()
    for step, actual, _ in ddpm(predict, x, Condition(labels=labels), schedule, noise.__getitem__, clip_x0=clip_x0):
        t = torch.full((2,), int(process.timesteps[step]))
        eps, fraction = (p.numpy() for p in toy_network(torch.as_tensor(expected), t, labels).out.chunk(2, dim=1))
        log_variance = process.log_variance(step, variance, fraction)
        score = np.cos(expected) if has_score else 0.0
        expected = process.ddpm(expected, eps, log_variance, step, noise[step].numpy(), score, clip_x0)
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-7, atol=1e-7 * np.abs(expected).max())


def test_the_cleanest_step_gives_x0_hat():
    x, _ = draws(1)
    actual = ddpm_step(x, linear_predictor(x, 0, NO_CONDITION), SCHEDULE, 0, forbidden_noise, clip_x0=False)
    bar = float(SCHEDULE.alpha_bar(0))
    torch.testing.assert_close(
        actual, (x - math.sqrt(1 - bar) * linear_predictor(x, 0, NO_CONDITION).eps) / math.sqrt(bar)
    )


@pytest.mark.parametrize("clip_x0", [True, False])
def test_the_clip_keeps_the_last_image_within_range(clip_x0):
    x, noise = draws(5)
    *_, (_, last, _) = ddpm(linear_predictor, 9 * x, NO_CONDITION, SCHEDULE, noise.__getitem__, clip_x0=clip_x0)
    assert (float(last.abs().max()) <= 1) == clip_x0


def test_the_score_moves_the_mean_by_variance_times_score_after_the_clip():
    x, noise = draws(5)
    p = Prediction(eps=0 * x, log_variance=torch.full_like(x, -2.0))
    with_score = ddpm_step(9 * x, replace(p, score=x), SCHEDULE, 3, noise.__getitem__)
    without = ddpm_step(9 * x, p, SCHEDULE, 3, noise.__getitem__)
    torch.testing.assert_close(with_score - without, math.exp(-2) * x)
