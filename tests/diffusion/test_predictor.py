import pytest
import torch

from sagl.diffusion.predictor import Condition, make_predictor, split_eps_and_variance
from sagl.diffusion.schedule import make_schedule
from sagl.settings.diffusion import DiffusionSettings
from sagl.shapes import AttentionSite
from tests.helpers import formulas
from tests.helpers.networks import toy_network
from tests.helpers.predictors import NO_CONDITION, Recorder

SCHEDULE = make_schedule(DiffusionSettings(), "10,15,20")


def images(dtype=torch.float32):
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_network_gets_the_timestep_of_the_original_process():
    network = Recorder(toy_network)
    for step in range(45):
        make_predictor(network, SCHEDULE, "learned_range")(images(), step, NO_CONDITION)
    assert [args[1].tolist() for args, _ in network.calls] == [[t, t] for t in SCHEDULE.timesteps.tolist()]


def test_the_network_gets_labels_and_sites_and_returns_attention():
    network, site = Recorder(toy_network), AttentionSite("middle")
    condition = Condition(labels=torch.tensor([4, 5]), attention_sites=(site,))
    prediction = make_predictor(network, SCHEDULE, "learned_range")(images(), 3, condition)
    (args, kwargs) = network.calls[0]
    assert args[2] is condition.labels
    assert kwargs == {"attention_sites": (site,)}
    assert prediction.attention[site].shape == (2, 1, 4, 4)
    assert prediction.nfe == 1
    assert prediction.score == 0
    assert prediction.terms == {}


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("step", [0, 1, 30, 44])
def test_eps_is_the_first_channels_and_the_variance_is_the_one_named(variance, step):
    x = images(torch.float64)
    actual = make_predictor(toy_network, SCHEDULE, variance)(x, step, NO_CONDITION)
    process = formulas.Process("linear", SCHEDULE.timesteps.tolist())
    torch.testing.assert_close(actual.eps, torch.tanh(0.7 * x + process.timesteps[step] / 1000))
    expected = torch.as_tensor(process.log_variance(step, variance, fraction=torch.sin(3 * x).numpy()))
    torch.testing.assert_close(actual.log_variance, expected, rtol=0, atol=1e-9)


def test_a_fixed_variance_needs_no_variance_channels():
    out = images()
    eps, log_variance = split_eps_and_variance(out, 3, SCHEDULE, 5, "fixed_small")
    assert torch.equal(eps, out)
    assert float(log_variance) == pytest.approx(float(SCHEDULE.log_posterior_variance(5)), abs=1e-6)


def test_arithmetic_outside_a_half_precision_network_has_the_dtype_of_x_t():
    def half(x, timesteps, labels=None, *, attention_sites=()):
        return toy_network(x.bfloat16(), timesteps, labels, attention_sites=attention_sites)

    prediction = make_predictor(half, SCHEDULE, "learned_range")(images(), 5, NO_CONDITION)
    assert prediction.eps.dtype == prediction.log_variance.dtype == torch.float32
