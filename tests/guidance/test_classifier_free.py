from dataclasses import replace

import pytest
import torch

from sagl.diffusion.predictor import Condition, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.errors import UserError
from sagl.guidance.base import guided
from sagl.guidance.classifier_free import classifier_free_guidance
from sagl.guidance.sag import sag
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import ClassifierFreeGuidance, SelfAttentionGuidance
from tests.helpers.toys import NOTHING, Recorder, toy_network

SCHEDULE = make_schedule(DiffusionSettings(), "ddim5")
LABELS = torch.tensor([1, 4])
TOLD = Condition(labels=LABELS)
SAG = SelfAttentionGuidance(scale=0.7, site="middle", blur_sigma=1.0)


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def cfg(scale):
    return {"cfg": classifier_free_guidance(ClassifierFreeGuidance(scale=scale))}


def predict(guidances, condition=TOLD, network=toy_network):
    """The guided prediction at step 3."""
    return guided(make_predictor(network, SCHEDULE, "learned_range"), guidances)(images(), 3, condition)


@pytest.mark.parametrize("scale", [-0.3, 0.5, 1.0, 4.0])
def test_the_prediction_is_eq_11_of_the_predictions_with_and_without_labels(scale):
    x, timesteps = images(), SCHEDULE.timestep(3, 2, torch.device("cpu"))
    with_labels, without = (toy_network(x, timesteps, labels).out[:, :3] for labels in (LABELS, None))
    got = predict(cfg(scale))
    torch.testing.assert_close(got.eps, without + (1 + scale) * (with_labels - without), rtol=1e-5, atol=1e-5)
    assert float((got.eps - with_labels).abs().max()) > 0.01
    assert got.score == 0


def test_the_variance_is_that_of_the_prediction_with_labels():
    assert torch.equal(predict(cfg(3.0)).log_variance, predict({}).log_variance)


def test_the_second_pass_is_at_the_same_image_and_timestep_without_labels_and_attention():
    network = Recorder(toy_network)
    prediction = predict(cfg(1.0), network=network)
    (first, _), (second, asked) = network.calls
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert (first[2] is LABELS, second[2]) == (True, None)
    assert asked["attention_sites"] == ()
    assert prediction.nfe == 2


def test_zero_scale_changes_nothing_and_costs_nothing_and_needs_no_labels():
    for condition in (TOLD, NOTHING):
        network = Recorder(toy_network)
        prediction = predict(cfg(0.0), condition, network)
        assert torch.equal(prediction.eps, predict({}, condition).eps)
        assert len(network.calls) == prediction.nfe == 1


def test_labels_must_be_given():
    with pytest.raises(UserError, match=r"`cfg\.scale` needs labels, got the null label"):
        predict(cfg(0.5), NOTHING)


def test_sag_and_classifier_free_guidance_together_are_the_sum_of_both_at_three_passes():
    network = Recorder(toy_network)
    both = predict({"sag": sag(SAG, SCHEDULE), **cfg(2.0)}, network=network)
    plain, alone = predict({}), [predict({"sag": sag(SAG, SCHEDULE)}), predict(cfg(2.0))]
    torch.testing.assert_close(both.eps, plain.eps + sum(p.eps - plain.eps for p in alone), rtol=0, atol=1e-5)
    assert len(network.calls) == both.nfe == 3
    assert [args[2] is None for args, _ in network.calls].count(True) == 1


def test_each_guidance_keeps_to_its_own_steps():
    early = replace(SAG, interval=(0.0, 0.2))
    assert predict({"sag": sag(early, SCHEDULE), **cfg(2.0)}).nfe == 2
