import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sagl.diffusion.predictor import Condition, Prediction, make_predictor
from sagl.diffusion.process import add_noise
from sagl.diffusion.schedule import make_schedule
from sagl.samplers.ddim import ddim, ddim_step
from sagl.samplers.ddpm import ddpm
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers import formulas
from tests.helpers.networks import toy_network
from tests.helpers.predictors import NO_CONDITION, draws, forbidden_noise
from tests.helpers.reference_values import trajectory_error, trajectory_names


@pytest.mark.parametrize("name", trajectory_names("ddim"))
def test_trajectory_equals_the_reference_values_at_every_step(name):
    assert max(trajectory_error(name, ddim)) < 1e-3


@pytest.mark.parametrize("respacing", ["7", "ddim10", "1,2,3", "1"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("has_score", [False, True])
def test_every_step_is_that_of_an_independent_implementation(respacing, kind, eta, clip_x0, has_score):
    schedule = make_schedule(DiffusionSettings(noise_schedule=kind), respacing)
    process = formulas.Process(kind, schedule.timesteps.tolist())
    x, noise = draws(schedule.num_steps)
    labels = torch.tensor([1, 3])
    base = make_predictor(toy_network, schedule, "learned_range")

    def predict(x_t, step, condition):
        return replace(base(x_t, step, condition), score=torch.cos(x_t) if has_score else 0.0)

    expected, condition = x.numpy(), Condition(labels=labels)
    for step, actual, _ in ddim(predict, x, condition, schedule, noise.__getitem__, clip_x0=clip_x0, eta=eta):
        t = torch.full((2,), int(process.timesteps[step]))
        eps = toy_network(torch.as_tensor(expected), t, labels).out[:, :3].numpy()
        score = np.cos(expected) if has_score else 0.0
        expected = process.ddim(expected, eps, step, noise[step].numpy(), score, clip_x0, eta)
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-7, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("clip_x0", [False, True])
def test_eta_1_is_ancestral_sampling_with_the_posteriors_variance(clip_x0):
    schedule, (x, noise) = make_schedule(DiffusionSettings(), "8"), draws(8)
    predict = make_predictor(toy_network, schedule, "fixed_small")
    ancestral = ddpm(predict, x, NO_CONDITION, schedule, noise.__getitem__, clip_x0=clip_x0)
    implicit = ddim(predict, x, NO_CONDITION, schedule, noise.__getitem__, clip_x0=clip_x0, eta=1.0)
    for (_, expected, _), (_, actual, _) in zip(ancestral, implicit, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_the_true_noise_gives_the_image():
    (x_0, noise), schedule = draws(1), make_schedule(DiffusionSettings(), "ddim10")

    def predict(x_t, step, condition):
        return Prediction(eps=noise[0], log_variance=torch.tensor(0.0))

    x_T = add_noise(x_0, noise[0], schedule.alpha_bar(9))
    *_, (_, last, _) = ddim(predict, x_T, NO_CONDITION, schedule, forbidden_noise, clip_x0=False)
    torch.testing.assert_close(last, x_0, rtol=0, atol=1e-9)


def test_the_score_shifts_eps_and_x0_hat_is_not_clipped_again():
    schedule, (x, _) = make_schedule(DiffusionSettings(), "ddim5"), draws(1)
    p = Prediction(eps=0 * x, log_variance=torch.tensor(0.0))
    score = torch.full_like(x, 3.0)
    with_score = ddim_step(9 * x, replace(p, score=score), schedule, 0, forbidden_noise)
    without = ddim_step(9 * x, p, schedule, 0, forbidden_noise)
    bar = float(schedule.alpha_bar(0))
    torch.testing.assert_close(with_score - without, (1 - bar) / math.sqrt(bar) * score, rtol=1e-9, atol=1e-9)
    assert float(without.abs().max()) <= 1 + 1e-9
    assert float(with_score.abs().max()) > 1
