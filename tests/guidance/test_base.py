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
from tests.helpers.toys import NOTHING, Recorder, forbidden_noise, plain, toy_network

SCHEDULE = make_schedule(DiffusionSettings(), "10")


def images(batch=2):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def away_from_scaled(factor, scale=0.5, **settings):
    """A guidance away from the prediction for a scaled x_t: one more pass."""

    def direction(denoise, x_t, step, condition, prediction):
        return extrapolate(denoise(factor * x_t, step, condition), prediction, scale)

    return Guidance(term=direction, **settings)


def scored(value):
    """A guidance by a score: no pass."""
    return Guidance(term=lambda _, x_t, *__: GuidanceTerm(score=value * x_t))


def positions(interval, steps):
    """Which positions of a chain, 0 the noisiest, a guidance is at work in."""
    guidance = limit_to_interval(away_from_scaled(0.5), interval, steps)
    return [steps - 1 - step for step in reversed(range(steps)) if guidance.is_active(step)]


def test_guided_by_nothing_is_the_denoiser_itself():
    assert with_guidance(plain, {}) is plain


@pytest.mark.parametrize("scale", [-0.1, 0.0, 0.5, 3.0])
def test_the_direction_away_from_a_weaker_prediction_is_eq_17(scale):
    x = images()
    strong, weak = plain(x, 3, NOTHING), plain(0.3 * x, 3, NOTHING)
    got = extrapolate(weak, strong, scale)
    torch.testing.assert_close(strong.eps + got.eps, weak.eps + (1 + scale) * (strong.eps - weak.eps))
    assert got.nfe == 1
    assert scale != 0 or torch.equal(strong.eps + got.eps, strong.eps)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_guidances_cost_one_pass_each_beside_the_plain_one(count):
    denoise = Recorder(plain)
    guidances = {str(k): away_from_scaled(0.1 * (k + 1)) for k in range(count)}
    prediction = with_guidance(denoise, guidances)(images(), 3, NOTHING)
    assert len(denoise.calls) == 1 + count
    assert prediction.nfe == 1 + count


def test_terms_are_taken_from_the_plain_prediction_and_summed():
    x = images()
    guidances = {"a": away_from_scaled(0.5, 0.7), "b": away_from_scaled(-1.0, -0.2), "c": scored(2.0), "d": scored(0.5)}
    together = with_guidance(plain, guidances)(x, 3, NOTHING)
    alone = {name: with_guidance(plain, {name: guidance})(x, 3, NOTHING) for name, guidance in guidances.items()}
    start = plain(x, 3, NOTHING)
    want = start.eps + sum(prediction.eps - start.eps for prediction in alone.values())
    torch.testing.assert_close(together.eps, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(together.score, 2.5 * x)
    assert list(together.terms) == list(guidances)
    torch.testing.assert_close(together.terms["a"].eps, alone["a"].eps - start.eps, rtol=0, atol=1e-6)
    assert together.log_variance is not None
    assert torch.equal(together.log_variance, start.log_variance)


def test_the_order_of_guidances_changes_nothing_beyond_rounding():
    x, guidances = images(), {"a": away_from_scaled(0.5), "b": away_from_scaled(-1.0, 0.9), "c": scored(2.0)}
    found = [with_guidance(plain, {n: guidances[n] for n in order})(x, 3, NOTHING) for order in permutations(guidances)]
    for prediction in found[1:]:
        assert prediction.nfe == found[0].nfe
        torch.testing.assert_close(prediction.eps, found[0].eps, rtol=0, atol=1e-6)
        torch.testing.assert_close(prediction.score, found[0].score, rtol=0, atol=1e-6)


def test_a_guided_denoiser_can_be_guided_again():
    x = images()
    once = with_guidance(plain, {"a": away_from_scaled(0.5, 1.0)})
    twice = with_guidance(once, {"b": away_from_scaled(0.0, 1.0)})(x, 3, NOTHING)
    assert twice.nfe == 4
    weaker = once(0 * x, 3, NOTHING).eps
    torch.testing.assert_close(twice.eps, 2 * once(x, 3, NOTHING).eps - weaker)


def test_only_the_plain_pass_is_asked_for_attention():
    asked, wanted = AttentionSite("middle"), AttentionSite("output.1")
    network = Recorder(toy_network)
    guidance = away_from_scaled(
        0.5, prepare_condition=lambda c: replace(c, attention_sites=(*c.attention_sites, asked))
    )
    denoise = with_guidance(make_predictor(network, SCHEDULE, "learned_range"), {"a": guidance, "b": guidance})
    labels = torch.tensor([1, 2])
    prediction = denoise(images(), 3, Condition(labels=labels, attention_sites=(wanted,)))
    sites = [kwargs["attention_sites"] for _, kwargs in network.calls]
    assert set(sites[0]) == {asked, wanted}
    assert sites[1:] == [(), ()]
    assert all(args[2] is labels for args, _ in network.calls)
    assert list(prediction.attention) == [wanted]


@pytest.mark.parametrize(
    ("interval", "steps", "want"),
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
def test_an_interval_guides_these_positions_of_the_chain_counted_from_the_noisiest(interval, steps, want):
    assert positions(interval, steps) == want


@pytest.mark.parametrize("cut", [0.1, 0.25, 0.333, 0.5, 0.77])
@pytest.mark.parametrize("steps", [1, 7, 10, 250])
def test_two_intervals_that_meet_guide_every_position_once(cut, steps):
    assert positions((0, cut), steps) + positions((cut, 1), steps) == list(range(steps))


def test_outside_the_interval_there_is_no_second_pass_and_the_prediction_is_the_plain_one():
    denoise = Recorder(plain)
    guidance = limit_to_interval(away_from_scaled(0.5), (0.2, 0.5), 10)
    costs = []
    for step, _, prediction in ddim(
        with_guidance(denoise, {"a": guidance}), images(), NOTHING, SCHEDULE, forbidden_noise
    ):
        costs.append(prediction.nfe)
        assert list(prediction.terms) == (["a"] if prediction.nfe == 2 else [])
        x_t = denoise.calls[-len(prediction.terms) - 1][0][0]
        assert torch.equal(prediction.eps, plain(x_t, step, NOTHING).eps) == (prediction.nfe == 1)
    assert costs == [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]
    assert len(denoise.calls) == 13


def test_an_interval_narrows_what_a_guidance_says_itself():
    guidance = limit_to_interval(away_from_scaled(0.5, is_active=lambda step: step % 2 == 0), (0, 0.5), 10)
    assert [step for step in range(10) if guidance.is_active(step)] == [6, 8]
