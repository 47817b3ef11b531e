import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sagl.diffusion.predictor import Condition, Prediction, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.samplers.ddpm import ddpm, ddpm_step
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers import oracle
from tests.helpers.reference import generator, trajectory_error, trajectory_names
from tests.helpers.toys import NOTHING, Recorder, forbidden_noise, plain, toy_network


def drawn(steps):
    """x_T and a noise for every step, float64."""
    g = generator(0)
    x, *noise = torch.randn(steps + 1, 2, 3, 8, 8, generator=g).double()
    return x, noise


@pytest.mark.parametrize("name", trajectory_names("ddpm"))
def test_trajectory_is_the_references_at_every_step(name):
    assert max(trajectory_error(name, ddpm)) < 1e-3


@pytest.mark.parametrize("respacing", ["7", "ddim10", "1,2,3", "1"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("scored", [False, True])
def test_every_step_of_other_settings_is_that_of_a_second_derivation(respacing, kind, variance, clip_x0, scored):
    schedule = make_schedule(DiffusionSettings(noise_schedule=kind), respacing)
    chain = oracle.Chain(kind, schedule.timesteps.tolist())
    x, noise = drawn(schedule.num_steps)
    labels = torch.tensor([1, 3])
    inner = make_predictor(toy_network, schedule, variance)

    def denoise(x_t, step, condition):
        return replace(inner(x_t, step, condition), score=torch.cos(x_t) if scored else 0.0)

    want = x.numpy()
    for step, got, _ in ddpm(denoise, x, Condition(labels=labels), schedule, noise.__getitem__, clip_x0=clip_x0):
        t = torch.full((2,), int(chain.timesteps[step]))
        eps, fraction = (p.numpy() for p in toy_network(torch.as_tensor(want), t, labels).out.chunk(2, dim=1))
        log_variance = chain.log_variance(step, variance, fraction)
        score = np.cos(want) if scored else 0.0
        want = chain.ddpm(want, eps, log_variance, step, noise[step].numpy(), score, clip_x0)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-7, atol=1e-7 * np.abs(want).max())


def test_steps_go_from_the_noisiest_to_the_cleanest_with_the_prediction_behind_each():
    schedule = make_schedule(DiffusionSettings(), "5")
    x, noise = drawn(5)
    condition, denoise = Condition(labels=torch.tensor([1, 2])), Recorder(plain)
    chain = list(ddpm(denoise, x, condition, schedule, noise.__getitem__))
    assert [step for step, _, _ in chain] == [4, 3, 2, 1, 0]
    inputs = [x, *(after for _, after, _ in chain[:-1])]
    for (args, _), x_t, (step, _, prediction) in zip(denoise.calls, inputs, chain, strict=True):
        assert args == (x_t, step, condition)
        assert torch.equal(prediction.eps, plain(x_t, step, condition).eps)


def test_the_chain_is_lazy():
    schedule = make_schedule(DiffusionSettings(), "5")
    x, noise = drawn(5)
    denoise = Recorder(plain)
    chain = ddpm(denoise, x, NOTHING, schedule, noise.__getitem__)
    assert denoise.calls == []
    next(chain)
    assert len(denoise.calls) == 1


def test_the_cleanest_step_draws_no_noise_and_gives_x0_hat():
    schedule, (x, _) = make_schedule(DiffusionSettings(), "5"), drawn(1)
    got = ddpm_step(x, plain(x, 0, NOTHING), schedule, 0, forbidden_noise, clip_x0=False)
    bar = float(schedule.alpha_bar(0))
    torch.testing.assert_close(got, (x - math.sqrt(1 - bar) * plain(x, 0, NOTHING).eps) / math.sqrt(bar))


def test_every_other_step_draws_once():
    schedule, (x, noise) = make_schedule(DiffusionSettings(), "5"), drawn(5)
    seen = Recorder(noise.__getitem__)
    list(ddpm(plain, x, NOTHING, schedule, seen))
    assert [args for args, _ in seen.calls] == [(4,), (3,), (2,), (1,)]


def test_with_the_clip_the_last_image_is_within_range():
    schedule, (x, noise) = make_schedule(DiffusionSettings(), "5"), drawn(5)
    last = {
        clip: list(ddpm(plain, 9 * x, NOTHING, schedule, noise.__getitem__, clip_x0=clip)) for clip in (True, False)
    }
    assert float(last[True][-1][1].abs().max()) <= 1
    assert float(last[False][-1][1].abs().max()) > 1


def test_the_score_moves_the_mean_by_variance_times_score_behind_the_clip():
    schedule, (x, noise) = make_schedule(DiffusionSettings(), "5"), drawn(5)
    p = Prediction(eps=0 * x, log_variance=torch.full_like(x, -2.0))
    moved = ddpm_step(9 * x, replace(p, score=x), schedule, 3, noise.__getitem__)
    still = ddpm_step(9 * x, p, schedule, 3, noise.__getitem__)
    torch.testing.assert_close(moved - still, math.exp(-2) * x)


def test_steps_keep_the_dtype_of_the_images():
    schedule, (x, noise) = make_schedule(DiffusionSettings(), "5"), drawn(5)
    denoise = make_predictor(toy_network, schedule, "learned_range")
    for _, after, _ in ddpm(denoise, x.float(), NOTHING, schedule, lambda step: noise[step].float()):
        assert after.dtype == torch.float32
