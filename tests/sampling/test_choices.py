import pytest
import torch

from sagl.configuration.sample import parse_sample_config
from sagl.errors import UserError
from sagl.models.memory import estimate_gradient_memory, estimate_memory
from sagl.models.zoo import RELEASED, get_classifier_settings, get_unet_settings
from sagl.sampling import choices
from sagl.sampling.choices import default_batch_size


@pytest.fixture
def free(monkeypatch):
    """A GPU; returns a function that sets its free memory."""
    monkeypatch.setattr(choices, "select_device", lambda _: torch.device("cuda", 0))
    return lambda size: monkeypatch.setattr(choices, "available_bytes", lambda _: size)


@pytest.mark.parametrize("scale", [0, 1])
def test_the_automatic_batch_size_on_a_gpu_counts_the_classifier_that_guides(scale, free):
    flags = ["--model", "fashion_mnist", "--num_samples", "500", "--trainer.precision", "32-true"]
    flags += ["--classifier.scale", str(scale)]
    network, _ = get_unet_settings("fashion_mnist")
    (weights, each), classifier = estimate_memory(network, torch.float32), (0, 0)
    if scale:
        classifier = estimate_gradient_memory(get_classifier_settings("fashion_mnist_classifier")[0], torch.float32)
    free(4 * (weights + classifier[0] + 10 * max(each, classifier[1])) // 3 + 4)
    assert default_batch_size(parse_sample_config(flags), network) == 10


def test_the_automatic_batch_size_is_64_or_what_32_bit_indices_allow(free):
    free(10**12)
    config = parse_sample_config(["--num_samples", "500", "--trainer.precision", "32-true"])
    assert default_batch_size(config, get_unet_settings("fashion_mnist")[0]) == 64
    assert default_batch_size(config, RELEASED["lsun_cat"].settings) == 63


def test_a_network_of_which_one_image_does_not_fit_is_refused(free):
    network, _ = get_unet_settings("fashion_mnist")
    free(sum(estimate_memory(network, torch.float32)) - 1)
    with pytest.raises(UserError, match=r"`checkpoint`.*image_size 32"):
        default_batch_size(parse_sample_config(["--trainer.precision", "32-true"]), network)
