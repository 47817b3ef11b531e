import pytest
import torch

from sagl.diffusion.noise import initial_noise, step_noise
from sagl.diffusion.predictor import Condition, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.errors import UserError
from sagl.guidance.base import with_guidance
from sagl.samplers.ddim import ddim
from sagl.samplers.ddpm import ddpm
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.networks import small_classifier, toy_network
from tests.helpers.predictors import NO_CONDITION, Recorder, guidances_of, linear_predictor

SCHEDULE = make_schedule(DiffusionSettings(), "ddim4")
LABELS = torch.tensor([1, 4])
SHAPE = (3, 16, 16)


def images():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def linear_classifier(x, timesteps):
    """Logits k · sum(x) for class k: the gradient of log p(y) is y less the mean class, at every pixel."""
    return x.flatten(1).sum(dim=1, keepdim=True) * torch.arange(5.0) / 100


def guided_by(classifier, scale, predict=linear_predictor):
    settings = {"scale": scale, "checkpoint": "classifier"}
    return with_guidance(predict, guidances_of(SCHEDULE, classifier=settings, classifier_network=classifier))


def score(scale=1.0, classifier=linear_classifier, x=None, step=2):
    return guided_by(classifier, scale)(images() if x is None else x, step, Condition(labels=LABELS))


def sampled(classifier, scale, sample, variance="learned_range"):
    predict = guided_by(classifier, scale, make_predictor(toy_network, SCHEDULE, variance))
    noise, x = step_noise(0, range(2), SHAPE, torch.device("cpu")), initial_noise(0, range(2), SHAPE)
    condition = Condition(labels=LABELS.clone())  # an inference tensor in inference mode
    return [x.clone() for _, x, _ in sample(predict, x, condition, SCHEDULE, noise)]


def test_after_use_deterministic_algorithms_the_gradient_is_strictly_deterministic():
    """The gradient of attention is deterministic in this mode alone; its kernel is chosen in the forward pass."""
    warn_only = []

    def classifier(x, timesteps):
        warn_only.append(torch.is_deterministic_algorithms_warn_only_enabled())
        hooked = x.clone()
        hooked.register_hook(lambda _: warn_only.append(torch.is_deterministic_algorithms_warn_only_enabled()))
        return linear_classifier(hooked, timesteps)

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        score(classifier=classifier)
        assert warn_only == [False, False]
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    score()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("scale", [-0.5, 1.0, 3.0])
def test_the_score_is_scale_times_the_gradient_of_the_log_probability(scale):
    x = images()
    p = linear_classifier(x, None).softmax(dim=1)
    expected = scale / 100 * (LABELS - p @ torch.arange(5.0))
    actual = score(scale).score
    torch.testing.assert_close(actual, expected[:, None, None, None].expand_as(x), rtol=1e-5, atol=1e-6)


def test_the_score_of_a_network_is_that_of_finite_differences():
    net, x, timesteps = small_classifier(), images(), SCHEDULE.timesteps[2].expand(2)
    actual = score(1.0, net, x).score
    direction = torch.sign(actual)

    def log_p(x):
        with torch.no_grad():
            return float(net(x, timesteps).double().log_softmax(dim=1)[range(2), LABELS].sum())

    slope = (log_p(x + 1e-3 * direction) - log_p(x - 1e-3 * direction)) / 2e-3
    assert float((actual * direction).sum()) == pytest.approx(slope, rel=0.02)


def test_the_classifier_gets_the_noisy_image_at_the_original_timestep():
    classifier, x = Recorder(linear_classifier), images()
    score(1.0, classifier, x, step=3)
    (args, _) = classifier.calls[0]
    assert torch.equal(args[0].detach(), x)
    assert args[1].tolist() == [750, 750]


def test_eps_is_the_base_predictions_and_the_unet_is_not_evaluated_again():
    predict, x = Recorder(linear_predictor), images()
    prediction = guided_by(linear_classifier, 2.0, predict)(x, 2, Condition(labels=LABELS))
    assert torch.equal(prediction.eps, linear_predictor(x, 2, NO_CONDITION).eps)
    assert len(predict.calls) == prediction.nfe == 1


def test_scale_0_neither_calls_the_classifier_nor_needs_labels():
    classifier = Recorder(linear_classifier)
    prediction = guided_by(classifier, 0.0)(images(), 2, NO_CONDITION)
    assert classifier.calls == []
    assert prediction.score == 0


def test_labels_must_be_given():
    with pytest.raises(UserError, match="`labels`"):
        guided_by(linear_classifier, 1.0)(images(), 2, NO_CONDITION)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("sample", [ddpm, ddim])
def test_the_gradient_is_the_same_in_every_gradient_mode(mode, sample):
    net = small_classifier()
    with torch.no_grad():
        expected = sampled(net, 2.0, sample)
    with mode():
        actual = sampled(net, 2.0, sample)
    assert all(p.grad is None for p in net.parameters())
    for a, b in zip(expected, actual, strict=True):
        assert torch.equal(a, b)


def test_guidance_makes_the_class_likelier():
    net, timesteps = small_classifier(), torch.zeros(2, dtype=torch.int64)

    def log_p(scale):
        x = sampled(net, scale, ddpm, "fixed_small")[-1]
        with torch.no_grad():
            return net(x, timesteps).log_softmax(dim=1)[range(2), LABELS]

    assert bool((log_p(20.0) > log_p(0.0)).all())
    assert bool((log_p(-20.0) < log_p(0.0)).all())
