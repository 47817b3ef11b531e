"""The bundled classifier: its settings, its accuracy and its guidance."""

from pathlib import Path

import pytest
import torch
import yaml

from sagl.data.fashion_mnist import PaddedFashionMNIST, prepare_fashion_mnist
from sagl.diffusion.classifier_loss import ClassifierLoss, classifier_loss
from sagl.diffusion.schedule import make_schedule
from sagl.models.checkpoints import NetworkWeights, build_classifier, build_network
from sagl.models.loading import load
from sagl.models.zoo import BUNDLED, get_classifier_settings
from sagl.sampling.pipeline import build_pipeline, run_to_end
from sagl.settings.compatibility import check_second_network
from sagl.settings.guidance import ClassifierGuidance
from sagl.settings.network import ClassifierSettings
from sagl.settings.sampling import SamplerSettings
from sagl.utils.files import cache_folder
from sagl.utils.images import to_float

CONFIG = Path(__file__).parents[2] / "configs" / "fashion_mnist_classifier.yaml"


@pytest.fixture(scope="module")
def file() -> NetworkWeights:
    return load("fashion_mnist_classifier")


@pytest.fixture(scope="module")
def result(file) -> ClassifierLoss:
    """1,000 garments of the test split, with noise at evenly spread timesteps."""
    prepare_fashion_mnist(cache_folder())
    garments = PaddedFashionMNIST(cache_folder(), train=False)
    x_0, labels = to_float(garments.images[:1000]), garments.labels[:1000]
    timesteps = torch.arange(1000) * file.diffusion.num_timesteps // 1000
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return classifier_loss(build_classifier(file), x_0, labels, timesteps, noise, make_schedule(file.diffusion))


def test_it_is_small_and_the_one_that_the_configuration_trains(file):
    trained = yaml.safe_load(CONFIG.read_text())["model"]
    assert BUNDLED["fashion_mnist_classifier"].stat().st_size <= 2.7e6
    assert {tensor.dtype for tensor in file.state_dict.values()} == {torch.float16}
    assert file.model_settings == ClassifierSettings(**trained["classifier"])
    assert file.diffusion.noise_schedule == trained["diffusion"]["noise_schedule"]
    assert get_classifier_settings("fashion_mnist_classifier") == (file.model_settings, file.diffusion)


def test_it_may_guide_the_bundled_network(file):
    network = load("fashion_mnist")
    parts = file.model_settings, file.diffusion, network.model_settings, network.diffusion
    check_second_network("classifier.checkpoint", *parts)


@pytest.mark.slow
def test_it_recognises_garments_the_better_the_less_noise_there_is(result):
    quarters = [float(right.mean()) for right in result.accuracy().chunk(4)]
    assert quarters[0] >= 0.8
    assert quarters == sorted(quarters, reverse=True)
    assert quarters[3] >= 0.25  # by chance it would be 0.1
    assert float(result.accuracy(5).mean()) >= 0.9


@pytest.mark.slow
def test_guided_images_have_a_higher_probability_of_their_class(file):
    network, classifier = load("fashion_mnist"), build_classifier(file)
    sampler, labels, ids = SamplerSettings(sampler="ddim", respacing="ddim10"), torch.arange(10), range(10)
    logs = []
    for scale in (0.0, 2.0):
        settings = ClassifierGuidance(scale=scale, checkpoint="fashion_mnist_classifier")
        pipeline = build_pipeline(
            build_network(network), network.diffusion, sampler, {"classifier": settings}, lambda _: classifier
        )
        with torch.inference_mode():
            x, _ = run_to_end(pipeline.sample_progressive(0, ids, labels))
            log_p = classifier(x, torch.zeros(10)).log_softmax(dim=1)
        logs.append(float(log_p[range(10), labels].mean()))
    assert logs[1] > logs[0]
