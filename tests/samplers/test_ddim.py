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
from tests.helpers import oracle
from tests.helpers.reference import generator, trajectory_error, trajectory_names
from tests.helpers.toys import NOTHING, Recorder, forbidden_noise, plain, toy_network


def drawn(steps):
    """x_T and a noise for every step, float64."""
    g = generator(0)
    x, *noise = torch.randn(steps + 1, 2, 3, 8, 8, generator=g).double()
    return x, noise


@pytest.mark.parametrize("name", trajectory_names("ddim"))
def test_trajectory_is_the_references_at_every_step(name):
    assert max(trajectory_error(name, ddim)) < 1e-3


@pytest.mark.parametrize("respacing", ["7", "ddim10", "1,2,3", "1"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("scored", [False, True])
def test_every_step_of_other_settings_is_that_of_a_second_derivation(respacing, kind, eta, clip_x0, scored):
    schedule = make_schedule(DiffusionSettings(noise_schedule=kind), respacing)
    chain = oracle.Chain(kind, schedule.timesteps.tolist())
    x, noise = drawn(schedule.num_steps)
    labels = torch.tensor([1, 3])
    inner = make_predictor(toy_network, schedule, "learned_range")

    def denoise(x_t, step, condition):
        return replace(inner(x_t, step, condition), score=torch.cos(x_t) if scored else 0.0)

    want, condition = x.numpy(), Condition(labels=labels)
    for step, got, _ in ddim(denoise, x, condition, schedule, noise.__getitem__, clip_x0=clip_x0, eta=eta):
        t = torch.full((2,), int(chain.timesteps[step]))
        eps = toy_network(torch.as_tensor(want), t, labels).out[:, :3].numpy()
        score = np.cos(want) if scored else 0.0
        want = chain.ddim(want, eps, step, noise[step].numpy(), score, clip_x0, eta)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-7, atol=1e-7 * np.abs(want).max())


def test_eta_zero_draws_no_noise():
    schedule, (x, _) = make_schedule(DiffusionSettings(), "ddim5"), drawn(1)
    assert len(list(ddim(plain, x, NOTHING, schedule, forbidden_noise))) == 5


def test_the_cleanest_step_draws_no_noise_at_any_eta():
    schedule, (x, noise) = make_schedule(DiffusionSettings(), "ddim5"), drawn(5)
    seen = Recorder(noise.__getitem__)
    list(ddim(plain, x, NOTHING, schedule, seen, eta=0.5))
    assert [args for args, _ in seen.calls] == [(4,), (3,), (2,), (1,)]


@pytest.mark.parametrize("clip_x0", [False, True])
def test_eta_one_is_ancestral_sampling_with_the_posteriors_variance(clip_x0):
    schedule, (x, noise) = make_schedule(DiffusionSettings(), "8"), drawn(8)
    denoise = make_predictor(toy_network, schedule, "fixed_small")
    ancestral = ddpm(denoise, x, NOTHING, schedule, noise.__getitem__, clip_x0=clip_x0)
    implicit = ddim(denoise, x, NOTHING, schedule, noise.__getitem__, clip_x0=clip_x0, eta=1.0)
    for (_, want, _), (_, got, _) in zip(ancestral, implicit, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_the_true_noise_leads_back_to_the_image_over_any_chain():
    (x_0, noise), schedule = drawn(1), make_schedule(DiffusionSettings(), "ddim10")

    def denoise(x_t, step, condition):
        return Prediction(eps=noise[0], log_variance=torch.tensor(0.0))

    x_T = add_noise(x_0, noise[0], schedule.alpha_bar(9))
    *_, (_, last, _) = ddim(denoise, x_T, NOTHING, schedule, forbidden_noise, clip_x0=False)
    torch.testing.assert_close(last, x_0, rtol=0, atol=1e-9)


def test_steps_go_from_the_noisiest_to_the_cleanest_with_the_prediction_behind_each():
    schedule, (x, _) = make_schedule(DiffusionSettings(), "ddim5"), drawn(1)
    condition, denoise = Condition(labels=torch.tensor([1, 2])), Recorder(plain)
    chain = list(ddim(denoise, x, condition, schedule, forbidden_noise))
    assert [step for step, _, _ in chain] == [4, 3, 2, 1, 0]
    inputs = [x, *(after for _, after, _ in chain[:-1])]
    assert [args for args, _ in denoise.calls] == [
        (x_t, k, condition) for x_t, (k, _, _) in zip(inputs, chain, strict=True)
    ]


def test_the_score_shifts_eps_and_x0_hat_is_not_clipped_again():
    schedule, (x, _) = make_schedule(DiffusionSettings(), "ddim5"), drawn(1)
    p = Prediction(eps=0 * x, log_variance=torch.tensor(0.0))
    score = torch.full_like(x, 3.0)
    moved = ddim_step(9 * x, replace(p, score=score), schedule, 0, forbidden_noise)
    still = ddim_step(9 * x, p, schedule, 0, forbidden_noise)
    bar = float(schedule.alpha_bar(0))
    torch.testing.assert_close(moved - still, (1 - bar) / math.sqrt(bar) * score, rtol=1e-9, atol=1e-9)
    assert float(still.abs().max()) <= 1 + 1e-9
    assert float(moved.abs().max()) > 1


def test_steps_keep_the_dtype_of_the_images():
    schedule, (x, noise) = make_schedule(DiffusionSettings(), "ddim5"), drawn(5)
    denoise = make_predictor(toy_network, schedule, "learned_range")
    for _, after, _ in ddim(denoise, x.float(), NOTHING, schedule, lambda step: noise[step].float(), eta=0.5):
        assert after.dtype == torch.float32
