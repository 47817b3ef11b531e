from dataclasses import replace
from itertools import permutations

import pytest
import torch

from sagl.diffusion.predictor import Condition, GuidanceTerm, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.guidance.base import Guidance, extrapolate, limit_to_interval, with_guidance
from sagl.samplers.ddim import ddim
from sagl.settings.diffusion import DiffusionSettings
from sagl.shapes import AttentionSite
from tests.helpers.networks import toy_network
from tests.helpers.predictors import NO_CONDITION, Recorder, forbidden_noise, linear_predictor
from tests.helpers.reference_values import generator

SCHEDULE = make_schedule(DiffusionSettings(), "10")
X = torch.randn(2, 3, 8, 8, generator=generator(0))


def by_scaled_input(factor, scale=0.5, **options):
    """A guidance away from the prediction for a scaled x_t, which costs one more evaluation."""

    def term(predict, x_t, step, condition, base_pred):
        return extrapolate(predict(factor * x_t, step, condition), base_pred, scale)

    return Guidance(term=term, **options)


def by_score(value):
    """A guidance by a score, which costs no evaluation."""
    return Guidance(term=lambda _, x_t, *__: GuidanceTerm(score=value * x_t), extra_nfe=0)


def guided_positions(interval, num_steps):
    """Positions, 0 the noisiest, at which a guidance is active."""
    guidance = limit_to_interval(by_scaled_input(0.5), interval, num_steps)
    return [num_steps - 1 - step for step in reversed(range(num_steps)) if guidance.is_active(step)]


def test_without_guidances_the_predictor_is_returned_itself():
    assert with_guidance(linear_predictor, {}) is linear_predictor


@pytest.mark.parametrize("scale", [-0.1, 0.0, 0.5, 3.0])
def test_extrapolation_is_eq_17_and_adds_exactly_nothing_at_scale_0(scale):
    base, weak_pred = linear_predictor(X, 3, NO_CONDITION), linear_predictor(0.3 * X, 3, NO_CONDITION)
    term = extrapolate(weak_pred, base, scale)
    torch.testing.assert_close(base.eps + term.eps, weak_pred.eps + (1 + scale) * (base.eps - weak_pred.eps))
    assert term.nfe == 1
    assert scale != 0 or torch.equal(base.eps + term.eps, base.eps)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_guidance_costs_one_evaluation_besides_the_base_prediction(count):
    predict = Recorder(linear_predictor)
    guidances = {str(k): by_scaled_input(0.1 * (k + 1)) for k in range(count)}
    prediction = with_guidance(predict, guidances)(X, 3, NO_CONDITION)
    assert len(predict.calls) == prediction.nfe == 1 + count


def test_terms_start_from_the_base_prediction_and_are_summed_in_any_order():
    guidances = {
        "a": by_scaled_input(0.5, 0.7),
        "b": by_scaled_input(-1.0, -0.2),
        "c": by_score(2.0),
        "d": by_score(0.5),
    }
    base = linear_predictor(X, 3, NO_CONDITION)
    alone = {
        name: with_guidance(linear_predictor, {name: guidance})(X, 3, NO_CONDITION)
        for name, guidance in guidances.items()
    }
    expected = base.eps + sum(prediction.eps - base.eps for prediction in alone.values())
    for order in permutations(guidances):
        together = with_guidance(linear_predictor, {name: guidances[name] for name in order})(X, 3, NO_CONDITION)
        torch.testing.assert_close(together.eps, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(together.score, 2.5 * X)
        assert tuple(together.terms) == order
        torch.testing.assert_close(together.terms["a"].eps, alone["a"].eps - base.eps, rtol=0, atol=1e-6)
        assert torch.equal(together.log_variance, base.log_variance)


def test_a_guided_predictor_can_be_guided_again():
    once = with_guidance(linear_predictor, {"a": by_scaled_input(0.5, 1.0)})
    twice = with_guidance(once, {"b": by_scaled_input(0.0, 1.0)})(X, 3, NO_CONDITION)
    assert twice.nfe == 4
    torch.testing.assert_close(twice.eps, 2 * once(X, 3, NO_CONDITION).eps - once(0 * X, 3, NO_CONDITION).eps)


def test_only_the_base_prediction_returns_attention():
    by_guidance, by_caller = AttentionSite("middle"), AttentionSite("output.1")
    network, labels = Recorder(toy_network), torch.tensor([1, 2])

    def prepare(condition):
        return replace(condition, attention_sites=(*condition.attention_sites, by_guidance))

    guidance = by_scaled_input(0.5, prepare_condition=prepare)
    predict = with_guidance(make_predictor(network, SCHEDULE, "learned_range"), {"a": guidance, "b": guidance})
    prediction = predict(X, 3, Condition(labels=labels, attention_sites=(by_caller,)))
    sites = [kwargs["attention_sites"] for _, kwargs in network.calls]
    assert set(sites[0]) == {by_guidance, by_caller}
    assert sites[1:] == [(), ()]
    assert all(args[2] is labels for args, _ in network.calls)
    assert list(prediction.attention) == [by_caller]


def test_a_term_that_remembers_steps_starts_anew_with_every_chain():
    def start_chain():
        steps = []

        def term(predict, x_t, step, condition, base_pred):
            steps.append(step)
            return GuidanceTerm(eps=float(len(steps)))

        return term

    remembering = Guidance(term=by_score(0.0).term, start_chain=start_chain)
    guidance = limit_to_interval(remembering, (0.5, 1), 10)
    chains = [with_guidance(linear_predictor, {"a": guidance}) for _ in range(2)]
    for _ in range(2):  # interleaved, as two batches in one process
        terms = [[predict(X, step, NO_CONDITION).terms for step in (9, 4, 3)] for predict in chains]
    assert [[list(t) for t in chain] for chain in terms] == [[[], ["a"], ["a"]]] * 2
    assert [[t["a"].eps for t in chain[1:]] for chain in terms] == [[3.0, 4.0]] * 2


@pytest.mark.parametrize(
    ("interval", "num_steps", "expected"),
    [
        ((0, 1), 6, [0, 1, 2, 3, 4, 5]),
        ((2 / 3, 1), 6, [4, 5]),
        ((0, 1 / 3), 6, [0, 1]),
        ((0.25, 0.75), 8, [2, 3, 4, 5]),
        ((0.2, 0.45), 7, [1, 2]),
        ((0.4, 0.6), 3, [1]),
        ((0.3, 0.31), 10, []),
        ((0, 0), 5, []),
        ((1, 1), 5, []),
        ((0.3, 0.8), 250, list(range(75, 200))),
    ],
)
def test_an_interval_guides_these_positions_counted_from_the_noisiest(interval, num_steps, expected):
    assert guided_positions(interval, num_steps) == expected


@pytest.mark.parametrize("cut", [0.1, 0.25, 0.333, 0.5, 0.77])
@pytest.mark.parametrize("num_steps", [1, 7, 10, 250])
def test_two_adjacent_intervals_guide_every_position_once(cut, num_steps):
    positions = guided_positions((0, cut), num_steps) + guided_positions((cut, 1), num_steps)
    assert positions == list(range(num_steps))


def test_outside_the_interval_the_prediction_is_the_base_prediction_at_its_cost():
    predict = Recorder(linear_predictor)
    guided = with_guidance(predict, {"a": limit_to_interval(by_scaled_input(0.5), (0.2, 0.5), 10)})
    costs = []
    for step, _, prediction in ddim(guided, X, NO_CONDITION, SCHEDULE, forbidden_noise):
        costs.append(prediction.nfe)
        assert list(prediction.terms) == (["a"] if prediction.nfe == 2 else [])
        x_t = predict.calls[-len(prediction.terms) - 1][0][0]
        assert torch.equal(prediction.eps, linear_predictor(x_t, step, NO_CONDITION).eps) == (prediction.nfe == 1)
    assert costs == [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]
    assert len(predict.calls) == 13


def test_an_interval_narrows_the_active_steps_of_a_guidance():
    guidance = limit_to_interval(by_scaled_input(0.5, is_active=lambda step: step % 2 == 0), (0, 0.5), 10)
    assert [step for step in range(10) if guidance.is_active(step)] == [6, 8]
