from dataclasses import replace
from itertools import islice

import pytest
import torch

from sagl.diffusion.noise import initial_noise
from sagl.diffusion.predictor import GuidanceTerm, Prediction
from sagl.diffusion.schedule import make_schedule
from sagl.errors import UserError
from sagl.guidance.base import Guidance, extrapolate, limit_to_interval, with_guidance
from sagl.guidance.policies import renew_every, stop_when_close
from sagl.models.checkpoints import cast_weights
from sagl.models.flops import flops_per_evaluation
from sagl.sampling.pipeline import build_pipeline, run_to_end
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    EpsScaling,
    HistoryGuidance,
    SelfAttentionGuidance,
)
from sagl.settings.sampling import SamplerSettings
from tests.helpers.networks import stable_unet
from tests.helpers.predictors import NO_CONDITION, Recorder, linear_predictor
from tests.helpers.reference_values import generator

NUM_STEPS = 8
SCHEDULE = make_schedule(DiffusionSettings(), str(NUM_STEPS))
X = torch.randn(3, 3, 8, 8, generator=generator(0))
LABELS = torch.tensor([0, 3])
STEPS = range(NUM_STEPS - 1, -1, -1)


def by_step():
    """A guidance whose term names the step that evaluated it."""
    return Guidance(term=lambda _, __, step, *___: GuidanceTerm(eps=float(step), nfe=1))


def terms(guidance, steps=STEPS):
    """The terms of one chain, None where there is none."""
    predict = with_guidance(linear_predictor, {"a": guidance})
    return [predict(X, step, NO_CONDITION).terms.get("a") for step in steps]


# ---------------------------------------------------------------------------------------------- every k steps


@pytest.mark.parametrize(
    ("every", "interval", "expected"),
    [
        (2, (0, 1), [7, 7, 5, 5, 3, 3, 1, 1]),
        (3, (0, 1), [7, 7, 7, 4, 4, 4, 1, 1]),
        (100, (0, 1), [7] * 8),
        (2, (0.125, 0.75), [None, 6, 6, 4, 4, 2, None, None]),
        (2, (0.5, 0.5), [None] * 8),
    ],
)
def test_a_term_is_renewed_in_every_kth_guided_step_and_reused_at_no_cost(every, interval, expected):
    guidance = renew_every(limit_to_interval(by_step(), interval, NUM_STEPS), every, NUM_STEPS)
    chain = terms(guidance)
    assert [term and term.eps for term in chain] == expected
    costs = [term.nfe for term in chain if term]
    assert sum(costs) == sum(guidance.is_active(step) and guidance.evaluates_term(step) for step in STEPS)
    assert sum(costs) == len({step for step in expected if step is not None})


def test_a_chain_that_starts_between_renewals_evaluates_its_first_term():
    guidance = renew_every(by_step(), 4, NUM_STEPS)
    assert [term.eps for term in terms(guidance, [5, 4, 3, 2])] == [5, 5, 3, 3]


def test_every_chain_has_its_own_last_term():
    guidance = renew_every(by_step(), NUM_STEPS, NUM_STEPS)
    chains = [with_guidance(linear_predictor, {"a": guidance}) for _ in range(2)]
    first, second = (predict(X, step, NO_CONDITION) for predict, step in zip(chains, (7, 6), strict=True))
    assert [first.terms["a"].eps, second.terms["a"].eps] == [7, 6]
    assert chains[0](X, 3, NO_CONDITION).terms["a"].eps == 7


# ----------------------------------------------------------------------------------------------------- stop_when_close


def close_from_step(differences, scale=0.5, stop_below=0.1, every=1):
    """A guidance whose weak x0_hat differs from the base one by `differences[step]`, (B,), times x0_hat."""

    def base(x_t, step, condition):  # x0_hat is 0.5 everywhere
        bar = float(SCHEDULE.alpha_bar(step))
        return Prediction(eps=(x_t - bar**0.5 * 0.5) / (1 - bar) ** 0.5, log_variance=torch.tensor(0.0))

    def term(predict, x_t, step, condition, base_pred):
        bar = float(SCHEDULE.alpha_bar(step))
        change = torch.tensor(differences[step])[: len(x_t), None, None, None] * 0.5 * bar**0.5 / (1 - bar) ** 0.5
        weak_pred = replace(predict(x_t, step, condition), eps=base_pred.eps - change)
        mask = torch.ones(len(x_t), 1, *x_t.shape[2:], dtype=torch.bool)
        return replace(extrapolate(weak_pred, base_pred, scale), extras={"mask": mask})

    settings = SelfAttentionGuidance(scale=scale, stop_below=stop_below)
    network = Recorder(base)
    guidance = renew_every(stop_when_close(Guidance(term=term), settings, SCHEDULE), every, NUM_STEPS)
    return network, with_guidance(network, {"a": guidance})


def guided_samples(prediction):
    """Whether each sample's term differs from 0."""
    return prediction.terms["a"].eps.flatten(1).abs().amax(dim=1).gt(0).tolist()


def test_a_sample_is_guided_up_to_the_first_step_that_is_close_and_not_again():
    big, small = 0.2, 0.05
    _, predict = close_from_step({7: [big] * 3, 6: [small, big, big], 5: [big, small, big], 4: [big] * 3})
    guided = [guided_samples(predict(X, step, NO_CONDITION)) for step in (7, 6, 5, 4)]
    assert guided == [[True, True, True], [True, True, True], [False, True, True], [False, False, True]]


def test_a_term_is_not_added_again_for_a_sample_that_ended_in_the_step_that_evaluated_it():
    big, small = 0.2, 0.05
    network, predict = close_from_step({7: [small, big, big], 4: [big, small, big], 1: [big, big, small]}, every=3)
    guided = [guided_samples(predict(X, step, NO_CONDITION)) for step in STEPS]
    first, second, third = [True] * 3, [False, True, True], [False, False, True]
    assert guided == [first, second, second, second, third, third, third, [False] * 3]
    assert len(network.calls) == NUM_STEPS + 3


@pytest.mark.parametrize("every", [1, 3])
def test_the_steps_after_a_samples_guidance_has_ended_do_not_count_in_its_mask_frequency(every):
    big, small = 0.2, 0.05
    differences = {7: [small, big, big], 6: [big] * 3, 5: [big] * 3, 4: [big, small, big]}
    _, predict = close_from_step({**dict.fromkeys(STEPS, [big] * 3), **differences}, every=every)
    _, frequency = run_to_end((step, X, predict(X, step, NO_CONDITION)) for step in STEPS)
    assert torch.equal(frequency, torch.ones(3, 1, 8, 8))


@pytest.mark.parametrize("scale", [0.5, -3.0])
def test_when_all_samples_have_ended_steps_cost_nothing_and_give_the_base_prediction(scale):
    network, predict = close_from_step({7: [0.2, 0.05, 0.05], 6: [0.05, 0.2, 0.2], 5: [0.2] * 3}, scale)
    costs = [predict(X, step, NO_CONDITION).nfe for step in (7, 6, 5, 4)]
    assert costs == [2, 2, 1, 1]
    assert len(network.calls) == 6
    assert torch.equal(predict(X, 3, NO_CONDITION).eps, network.called(X, 3, NO_CONDITION).eps)


def test_the_bytes_of_a_sample_do_not_depend_on_when_others_end():
    mine = {7: 0.2, 6: 0.05, 5: 0.2, 4: 0.2}
    chains = []
    for other in (0.2, 0.05):
        _, predict = close_from_step({step: [value, other, other] for step, value in mine.items()})
        chains.append([predict(X, step, NO_CONDITION).eps[0] for step in mine])
    assert all(torch.equal(a, b) for a, b in zip(*chains, strict=True))


def test_a_limit_that_is_never_reached_changes_no_byte():
    differences = dict.fromkeys(STEPS, [0.2] * 3)
    _, always = close_from_step(differences, stop_below=0.0)
    _, limited = close_from_step(differences, stop_below=1e-6)
    for step in STEPS:
        assert torch.equal(always(X, step, NO_CONDITION).eps, limited(X, step, NO_CONDITION).eps)


# ------------------------------------------------------------------------------------------------------ pipelines


def pipeline_of(network, **settings):
    guidances = {
        "sag": SelfAttentionGuidance(**{"scale": 0.5, "site": "output.1", "blur_sigma": 1.0, **settings}),
        "cfg": ClassifierFreeGuidance(scale=0.3),
    }
    sampler = SamplerSettings(sampler="ddim", respacing=f"ddim{NUM_STEPS}")
    return build_pipeline(network, DiffusionSettings(), sampler, guidances)


def test_a_weak_evaluation_that_reuses_deep_blocks_starts_at_the_base_evaluations_features_and_costs_its_share():
    network = stable_unet()
    whole, shallow = (pipeline_of(network, reuse_before=block) for block in (None, "output.2"))
    share = flops_per_evaluation(network.settings, "output.2") / flops_per_evaluation(network.settings)
    starts = []
    with torch.inference_mode():
        network.register_forward_pre_hook(lambda _, args, kwargs: starts.append(kwargs.get("start")), with_kwargs=True)
        (_, x, pred), (_, _, second) = islice(shallow.sample_progressive(0, [0, 1], LABELS), 2)
        (_, other, expected), *_ = whole.sample_progressive(0, [0, 1], LABELS)
        x_T = initial_noise(0, [0, 1], (3, 16, 16))
        timesteps = shallow.schedule.timestep(NUM_STEPS - 1, 2, x_T.device)
        features = network(x_T, timesteps, LABELS, block_inputs=["output.2"]).block_inputs["output.2"]
    assert 0 < share < 0.9
    assert (pred.nfe, second.nfe) == (pytest.approx(2 + share),) * 2
    assert shallow.nfe == pytest.approx(NUM_STEPS * (2 + share))
    assert [start and start[0] for start in starts[:6]] == [None, "output.2", None] * 2  # base, sag, cfg
    assert torch.equal(starts[1][1], features)
    assert torch.equal(pred.terms["cfg"].eps, expected.terms["cfg"].eps)
    assert torch.equal(pred.terms["sag"].extras["mask"], expected.terms["sag"].extras["mask"])
    assert not torch.equal(x, other)


@pytest.mark.parametrize("mask", ["attention", "random", "square", "global"])
def test_masks_shapes_and_policies_work_with_a_network_in_bfloat16(mask):
    network = cast_weights(stable_unet(), "bf16-true", torch.device("cpu"))
    pipeline = pipeline_of(
        network, mask=mask, shape="off_unsharp", max_norm=0.1, renew_every=2, stop_below=1e-9, reuse_before="output.2"
    )
    with torch.inference_mode():
        x, mask_frequency = pipeline.sample(0, [0, 1], LABELS)
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert 0 < float(mask_frequency.mean()) <= 1


@pytest.mark.parametrize("shape", [{}, {"shape": "off_unsharp", "max_norm": 0.1}], ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_a_guidance_that_ends_takes_fewer_evaluations_than_nfe_and_masks_nothing_more(every, shape):
    network = stable_unet()
    pipeline = pipeline_of(network, stop_below=1e9, renew_every=every, **shape)
    with torch.inference_mode():
        steps = list(pipeline.sample_progressive(0, [0, 1], LABELS))
        one_step, mask_frequency = pipeline_of(network, interval=(0, 0.125), **shape).sample(0, [0, 1], LABELS)
    assert [prediction.nfe for _, _, prediction in steps] == [3, 2, 2, 2, 2, 2, 2, 2]
    assert [bool(p.terms["sag"].extras["mask"].any()) for _, _, p in steps] == [True] + [False] * 7
    assert torch.equal(steps[-1][1], one_step)
    assert torch.equal(run_to_end(iter(steps))[1], mask_frequency)


@pytest.mark.parametrize("settings", [ClassifierGuidance, HistoryGuidance, EpsScaling, Autoguidance])
def test_blocks_are_reused_only_by_weak_evaluations_of_the_network_itself(settings):
    with pytest.raises(UserError, match=r"`\w+\.reuse_before`.*output\.1"):
        settings(reuse_before="output.1")


@pytest.mark.parametrize("changes", [{"renew_every": 0}, {"stop_below": -0.1}, {"stop_below": float("nan")}], ids=str)
def test_impossible_policies_are_refused(changes):
    with pytest.raises(UserError, match=rf"`cfg\.{next(iter(changes))}`"):
        ClassifierFreeGuidance(**changes)
