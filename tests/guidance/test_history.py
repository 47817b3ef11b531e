import pytest
import torch

from sagl.diffusion.predictor import Condition, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.errors import UserError
from sagl.guidance.base import with_guidance
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import HistoryGuidance
from tests.helpers.errors import refused
from tests.helpers.networks import toy_network
from tests.helpers.predictors import NO_CONDITION, Recorder, guidances_of

SCHEDULE = make_schedule(DiffusionSettings(), "6")
CHAIN = torch.randn(6, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
"""x_t of every step, whatever the guidance."""


def predictions(network=toy_network, **settings):
    """The guided predictions of a chain, the noisiest step first."""
    predict = make_predictor(network, SCHEDULE, "learned_range")
    guided = with_guidance(predict, guidances_of(SCHEDULE, history=settings))
    return [guided(CHAIN[step], step, NO_CONDITION) for step in reversed(range(6))]


def x0_hat(step, eps):
    bar = SCHEDULE.alpha_bar(step)
    return (CHAIN[step] - (1 - bar).sqrt() * eps) / bar.sqrt()


@pytest.mark.parametrize("decay", [0.0, 0.6])
@pytest.mark.parametrize("average", ["eps", "x0_hat"])
def test_the_weak_prediction_is_the_average_of_the_earlier_ones(average, decay):
    base = [p.eps for p in predictions(scale=0.0)]
    actual = [p.eps for p in predictions(scale=1.5, decay=decay, average=average)]
    torch.testing.assert_close(actual[0], base[0], rtol=0, atol=0)
    for k in range(1, 6):
        step, earlier = 5 - k, base[:k] if average == "eps" else [x0_hat(5 - j, base[j]).clamp(-1, 1) for j in range(k)]
        weights = [decay ** (k - 1), *((1 - decay) * decay ** (k - 1 - j) for j in range(1, k))]
        weighted = sum(w * p for w, p in zip(weights, earlier, strict=True))
        if average == "eps":
            torch.testing.assert_close(actual[k], base[k] + 1.5 * (base[k] - weighted), rtol=1e-5, atol=1e-5)
        else:
            current = x0_hat(step, base[k])
            torch.testing.assert_close(
                x0_hat(step, actual[k]), current + 1.5 * (current - weighted), rtol=1e-5, atol=1e-5
            )


def test_no_evaluation_is_added_and_the_history_starts_with_the_interval():
    network = Recorder(toy_network)
    guided = predictions(network, scale=1.0, interval=(0.5, 1.0))
    assert len(network.calls) == sum(p.nfe for p in guided) == 6
    base = [p.eps for p in predictions(scale=0.0)]
    assert [torch.equal(p.eps, eps) for p, eps in zip(guided, base, strict=True)] == [True] * 4 + [False] * 2


def test_the_history_holds_base_predictions_whatever_the_other_terms():
    predict = make_predictor(toy_network, SCHEDULE, "learned_range")
    history = {"scale": 1.0}
    both = with_guidance(predict, guidances_of(SCHEDULE, history=history, cfg={"scale": 3.0}))
    labelled = Condition(labels=torch.tensor([1, 2]))
    alone = with_guidance(predict, guidances_of(SCHEDULE, history=history))
    for step in (5, 4, 3):
        terms = [p(CHAIN[step], step, labelled).terms["history"].eps for p in (both, alone)]
    torch.testing.assert_close(*terms, rtol=0, atol=0)


@pytest.mark.parametrize("every", [0, 2, 100])
def test_a_history_without_some_of_the_steps_is_refused(every):
    with refused("`history.renew_every`", every):
        HistoryGuidance(renew_every=every)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_an_impossible_decay_is_refused(decay):
    with pytest.raises(UserError, match=r"`history\.decay`"):
        HistoryGuidance(decay=decay)
