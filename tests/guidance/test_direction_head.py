from dataclasses import replace

import pytest
import torch

from sagl.diffusion.predictor import Condition, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.errors import UserError
from sagl.guidance.base import with_guidance
from sagl.guidance.registry import GUIDANCES
from sagl.guidance.sag import gaussian_blur
from sagl.sampling.pipeline import build_pipeline
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.sampling import SamplerSettings
from tests.helpers.heads import SAG
from tests.helpers.networks import count_calls, grey_unet
from tests.helpers.predictors import Recorder, guidances_of

NUM_STEPS = 10
SCHEDULE = make_schedule(DiffusionSettings(), str(NUM_STEPS))
TWO_LEVELS = {"channel_mult": (1, 2), "attention_resolutions": (8, 4)}
NETWORK = grey_unet(**TWO_LEVELS)
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
STEP, SCALE = 4, 0.7
SETTINGS = {"scale": SCALE, "site": "output.0", "blur_sigma": 1.0}


def head(images, maps, timesteps):
    """A head that depends on all of its inputs."""
    coarse, fine = (feature_map.mean(dim=1, keepdim=True) for feature_map in maps)
    features = fine + coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return images[:, :1] * images[:, -1:] + features + timesteps[:, None, None, None] / 1000


def predict(step=STEP, *, network=NETWORK, condition=Condition(), head=head, **groups):  # noqa: B008 (frozen)
    guidances = guidances_of(SCHEDULE, network=network, head=head, **groups)
    with torch.no_grad():
        return with_guidance(make_predictor(network, SCHEDULE, "learned_range"), guidances)(X, step, condition)


def test_the_term_is_the_scale_times_the_head_of_the_base_evaluation():
    recorder = Recorder(head)
    guided = predict(head=recorder, sag={**SETTINGS, "direction_head": "file"})
    real, base_pred = predict(sag=SETTINGS), predict(condition=Condition(features=True, block_inputs=("output.1",)))
    ((images, maps, timesteps), _) = recorder.calls[0]
    alpha_bar = SCHEDULE.alpha_bar(STEP).float()
    mask = real.terms["sag"].extras["mask"]
    x0_hat = ((X - (1 - alpha_bar).sqrt() * base_pred.eps) / alpha_bar.sqrt()).clamp(-1, 1)
    high_pass = (alpha_bar / (1 - alpha_bar)).sqrt() * (x0_hat - gaussian_blur(x0_hat, 15, 1.0))
    expected = torch.cat([X, x0_hat, high_pass, mask * high_pass, mask.float()], dim=1)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    assert mask.any()
    assert not mask.all()
    assert torch.equal(maps[0], base_pred.block_inputs["output.1"])
    assert torch.equal(maps[1], base_pred.features)
    assert timesteps.tolist() == [int(SCHEDULE.timesteps[STEP])] * 2
    torch.testing.assert_close(guided.eps, base_pred.eps + SCALE * head(images, maps, timesteps))
    assert torch.equal(guided.terms["sag"].extras["mask"].bool(), mask)
    assert guided.nfe == 1


def test_a_head_of_zeros_gives_the_unguided_prediction():
    zero = predict(head=lambda images, *_: torch.zeros_like(images[:, :1]), sag={**SETTINGS, "direction_head": "file"})
    assert torch.equal(zero.eps, predict().eps)


def test_maps_are_returned_only_if_they_are_requested():
    guided = predict(sag={**SETTINGS, "direction_head": "file"})
    assert (guided.features, guided.block_inputs) == (None, {})
    condition = Condition(features=True, block_inputs=("output.1",))
    guided, plain = predict(condition=condition, sag=SETTINGS), predict(condition=condition)
    assert torch.equal(guided.features, plain.features)
    assert torch.equal(guided.block_inputs["output.1"], plain.block_inputs["output.1"])


@pytest.mark.parametrize(("renew_every", "reuse_before"), [(1, None), (3, None), (4, None), (3, "output.1")])
def test_every_kth_guided_step_has_the_methods_own_term_and_the_others_cost_one_evaluation(renew_every, reuse_before):
    network = grey_unet(**TWO_LEVELS)
    calls = count_calls(network)
    options = {**SETTINGS, "site": "output.2", "interval": (0.2, 1.0), "reuse_before": reuse_before}
    cost = 0.5 if reuse_before else 1
    settings = replace(SAG, **options, direction_head="file", renew_every=renew_every)
    guidances = guidances_of(
        SCHEDULE, network=network, head=head, sag={**options, "direction_head": "file", "renew_every": renew_every}
    )
    predictor = with_guidance(make_predictor(network, SCHEDULE, "learned_range"), guidances)
    for k, step in enumerate(reversed(range(NUM_STEPS))):
        calls.clear()
        with torch.no_grad():
            prediction = predictor(X, step, Condition())
        is_real = renew_every > 1 and k >= 2 and (k - 2) % renew_every == 0
        assert len(calls) == 1 + is_real
        assert prediction.nfe == 1 + is_real * cost
        if is_real:
            assert torch.equal(prediction.eps, predict(step, sag=options).eps)
    pipeline = build_pipeline(network, DiffusionSettings(), SamplerSettings(sampler="ddim", respacing="10"))
    count = replace(pipeline, guidances=guidances).nfe
    assert count == NUM_STEPS + cost * (0 if renew_every == 1 else len(range(0, 8, settings.renew_every)))


@pytest.mark.parametrize("method", [name for name, e in GUIDANCES.items() if e.settings_class.has_weak_prediction])
def test_every_method_with_a_weak_prediction_can_have_a_head(method):
    recorder = Recorder(head)
    settings = {"scale": SCALE, "direction_head": "file"} | ({"site": "output.0"} if method == "sag" else {})
    settings |= {"checkpoint": "weak"} if method == "autoguidance" else {}
    condition = Condition(labels=torch.tensor([0, 1]))
    guided = predict(condition=condition, head=recorder, **{method: settings})
    images = recorder.calls[0][0][0]
    assert images.shape[1] == (5 if method == "sag" else 3)
    assert guided.nfe == 1
    torch.testing.assert_close(guided.eps, predict(condition=condition).eps + SCALE * head(*recorder.calls[0][0]))


@pytest.mark.parametrize("method", ["classifier", "history", "eps_scaling"])
def test_a_method_without_a_weak_prediction_has_no_head(method):
    with pytest.raises(UserError, match=f"`{method}.direction_head`"):
        GUIDANCES[method].settings_class(direction_head="auto")


def test_shapes_act_on_the_term_of_a_head():
    settings = {**SETTINGS, "direction_head": "file"}
    term, shaped = (predict(sag=s).terms["sag"].eps for s in (settings, {**settings, "shape": "high_pass"}))
    torch.testing.assert_close(shaped, term - gaussian_blur(term, 15, 1.0), rtol=1e-4, atol=1e-6)
