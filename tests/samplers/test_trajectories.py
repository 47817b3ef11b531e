"""Properties that all samplers share."""

import pytest
import torch

from sagl.diffusion.predictor import Condition
from sagl.diffusion.schedule import make_schedule
from sagl.samplers.ddim import ddim
from sagl.samplers.ddpm import ddpm
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.predictors import NO_CONDITION, Recorder, draws, linear_predictor

SCHEDULE = make_schedule(DiffusionSettings(), "5")
X_T, NOISE = draws(5)
every_sampler = pytest.mark.parametrize(("sample", "options"), [(ddpm, {}), (ddim, {}), (ddim, {"eta": 0.5})])


@every_sampler
def test_steps_go_from_the_noisiest_to_the_cleanest_with_their_predictions(sample, options):
    condition, predict = Condition(labels=torch.tensor([1, 2])), Recorder(linear_predictor)
    steps = list(sample(predict, X_T, condition, SCHEDULE, NOISE.__getitem__, **options))
    assert [step for step, _, _ in steps] == [4, 3, 2, 1, 0]
    inputs = [X_T, *(x for _, x, _ in steps[:-1])]
    for (args, _), x_t, (step, _, prediction) in zip(predict.calls, inputs, steps, strict=True):
        assert args == (x_t, step, condition)
        assert torch.equal(prediction.eps, linear_predictor(x_t, step, condition).eps)


@every_sampler
def test_a_step_is_computed_when_it_is_asked_for(sample, options):
    predict = Recorder(linear_predictor)
    steps = sample(predict, X_T, NO_CONDITION, SCHEDULE, NOISE.__getitem__, **options)
    assert predict.calls == []
    next(steps)
    assert len(predict.calls) == 1


@every_sampler
def test_every_step_but_the_cleanest_draws_noise_once_and_ddim_at_eta_0_none(sample, options):
    noise = Recorder(NOISE.__getitem__)
    list(sample(linear_predictor, X_T, NO_CONDITION, SCHEDULE, noise, **options))
    assert [args for args, _ in noise.calls] == ([] if (sample, options) == (ddim, {}) else [(4,), (3,), (2,), (1,)])


@every_sampler
def test_steps_keep_the_dtype_of_the_images(sample, options):
    for _, x, _ in sample(
        linear_predictor, X_T.float(), NO_CONDITION, SCHEDULE, lambda step: NOISE[step].float(), **options
    ):
        assert x.dtype == torch.float32
