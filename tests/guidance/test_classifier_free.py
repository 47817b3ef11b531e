import pytest
import torch

from sagl.diffusion.predictor import Condition, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.errors import UserError
from sagl.guidance.base import with_guidance
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.networks import toy_network
from tests.helpers.predictors import NO_CONDITION, Recorder, guidances_of

SCHEDULE = make_schedule(DiffusionSettings(), "ddim5")
LABELS = torch.tensor([1, 4])
LABELLED = Condition(labels=LABELS)


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def predict(condition=LABELLED, network=toy_network, **settings):
    """The guided prediction at step 3."""
    predictor = make_predictor(network, SCHEDULE, "learned_range")
    return with_guidance(predictor, guidances_of(SCHEDULE, **settings))(images(), 3, condition)


@pytest.mark.parametrize("scale", [-0.3, 0.5, 1.0, 4.0])
def test_the_prediction_is_eq_11_of_the_predictions_with_and_without_labels(scale):
    x, timesteps = images(), SCHEDULE.timestep(3, 2, torch.device("cpu"))
    with_labels, without = (toy_network(x, timesteps, labels).out[:, :3] for labels in (LABELS, None))
    actual = predict(cfg={"scale": scale})
    torch.testing.assert_close(actual.eps, without + (1 + scale) * (with_labels - without), rtol=1e-5, atol=1e-5)
    assert float((actual.eps - with_labels).abs().max()) > 0.01
    assert actual.score == 0


def test_the_variance_is_that_of_the_prediction_with_labels():
    assert torch.equal(predict(cfg={"scale": 3.0}).log_variance, predict().log_variance)


def test_the_second_evaluation_has_the_same_image_and_timestep_and_neither_labels_nor_attention():
    network = Recorder(toy_network)
    prediction = predict(network=network, cfg={"scale": 1.0})
    (first, _), (second, options) = network.calls
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert (first[2] is LABELS, second[2]) == (True, None)
    assert options["attention_sites"] == ()
    assert prediction.nfe == 2


def test_scale_0_changes_nothing_costs_nothing_and_needs_no_labels():
    for condition in (LABELLED, NO_CONDITION):
        network = Recorder(toy_network)
        prediction = predict(condition, network, cfg={"scale": 0.0})
        assert torch.equal(prediction.eps, predict(condition).eps)
        assert len(network.calls) == prediction.nfe == 1


def test_labels_must_be_given():
    with pytest.raises(UserError, match="`labels`"):
        predict(NO_CONDITION, cfg={"scale": 0.5})
