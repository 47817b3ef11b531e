"""Properties that all samplers share."""

import pytest
import torch

from sagl.diffusion.predictor import Condition
from sagl.diffusion.schedule import make_schedule
from sagl.samplers.ddim import ddim
from sagl.samplers.ddpm import ddpm
from sagl.samplers.dpm_solver import dpm_solver_pp_2m
from sagl.samplers.heun import heun
from sagl.samplers.unipc import unipc
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.predictors import NO_CONDITION, Recorder, draws, linear_predictor

SCHEDULE = make_schedule(DiffusionSettings(), "5")
X_T, NOISE = draws(5)
SAMPLERS = [(ddpm, {}), (ddim, {}), (ddim, {"eta": 0.5}), (dpm_solver_pp_2m, {}), (heun, {}), (unipc, {})]
every_sampler = pytest.mark.parametrize(("sample", "options"), SAMPLERS)


@every_sampler
def test_steps_go_from_the_noisiest_to_the_cleanest_with_their_predictions(sample, options):
    condition, predict = Condition(labels=torch.tensor([1, 2])), Recorder(linear_predictor)
    steps = list(sample(predict, X_T, condition, SCHEDULE, NOISE.__getitem__, **options))
    assert [step for step, _, _ in steps] == [4, 3, 2, 1, 0]
    inputs = [X_T, *(x for _, x, _ in steps[:-1])]
    assert all(args[2] is condition for args, _ in predict.calls)
    for x_t, (step, _, prediction) in zip(inputs, steps, strict=True):
        assert any(args[0] is x_t and args[1] == step for args, _ in predict.calls)
        assert torch.equal(prediction.eps, linear_predictor(x_t, step, condition).eps)


@every_sampler
def test_the_predictions_count_all_evaluations(sample, options):
    predict = Recorder(linear_predictor)
    steps = sample(predict, X_T, NO_CONDITION, SCHEDULE, NOISE.__getitem__, **options)
    nfe = [prediction.nfe for _, _, prediction in steps]
    assert sum(nfe) == len(predict.calls)
    assert nfe == ([2, 2, 2, 2, 1] if sample is heun else [1, 1, 1, 1, 1])


@every_sampler
def test_a_step_is_computed_when_it_is_asked_for(sample, options):
    predict = Recorder(linear_predictor)
    steps = sample(predict, X_T, NO_CONDITION, SCHEDULE, NOISE.__getitem__, **options)
    assert predict.calls == []
    _, _, prediction = next(steps)
    assert len(predict.calls) == prediction.nfe


@every_sampler
def test_every_step_but_the_cleanest_of_a_stochastic_sampler_draws_noise_once(sample, options):
    noise = Recorder(NOISE.__getitem__)
    list(sample(linear_predictor, X_T, NO_CONDITION, SCHEDULE, noise, **options))
    assert [args for args, _ in noise.calls] == ([(4,), (3,), (2,), (1,)] if sample is ddpm or options else [])


@every_sampler
def test_steps_keep_the_dtype_of_the_images(sample, options):
    for _, x, _ in sample(
        linear_predictor, X_T.float(), NO_CONDITION, SCHEDULE, lambda step: NOISE[step].float(), **options
    ):
        assert x.dtype == torch.float32
