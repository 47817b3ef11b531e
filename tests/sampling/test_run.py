from dataclasses import replace

import pytest
import torch

from sagl.commands._config import parse_sample_config
from sagl.errors import UserError
from sagl.models.flops import flops_per_evaluation
from sagl.models.memory import estimate_gradient_memory, estimate_memory
from sagl.models.zoo import RELEASED, get_classifier_settings, get_unet_settings
from sagl.sampling import run
from sagl.sampling.pipeline import build_pipeline
from sagl.sampling.run import _default_batch_size
from sagl.sampling.run_folder import read_run_json
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.sampling import SamplerSettings
from tests.helpers.networks import stable_unet


@pytest.fixture
def free(monkeypatch):
    """A GPU; returns a function that sets its free memory."""
    monkeypatch.setattr(run, "select_device", lambda _: torch.device("cuda", 0))
    return lambda size: monkeypatch.setattr(run, "available_bytes", lambda _: size)


@pytest.mark.parametrize("scale", [0, 1])
def test_the_automatic_batch_size_on_a_gpu_counts_the_classifier_that_guides(scale, free):
    flags = ["--num_samples", "500", "--trainer.precision", "32-true", "--classifier.scale", str(scale)]
    network, _ = get_unet_settings("fashion_mnist")
    (weights, each), classifier = estimate_memory(network, torch.float32), (0, 0)
    if scale:
        classifier = estimate_gradient_memory(get_classifier_settings("fashion_mnist_classifier")[0], torch.float32)
    free(4 * (weights + classifier[0] + 10 * max(each, classifier[1])) // 3 + 4)
    assert _default_batch_size(parse_sample_config(flags), network) == 10


def test_the_automatic_batch_size_is_64_or_what_32_bit_indices_allow(free):
    free(10**12)
    config = parse_sample_config(["--num_samples", "500", "--trainer.precision", "32-true"])
    assert _default_batch_size(config, get_unet_settings("fashion_mnist")[0]) == 64
    assert _default_batch_size(config, RELEASED["lsun_cat"].settings) == 63


def test_a_network_of_which_one_image_does_not_fit_is_refused(free):
    network, _ = get_unet_settings("fashion_mnist")
    free(sum(estimate_memory(network, torch.float32)) - 1)
    with pytest.raises(UserError, match=r"`checkpoint`.*image_size 32"):
        _default_batch_size(parse_sample_config(["--trainer.precision", "32-true"]), network)


def test_the_recorded_evaluations_are_the_mean_of_the_batches(tmp_path):
    """Guidance methods may decide while they run whether to evaluate the network."""
    pipeline = build_pipeline(stable_unet(), DiffusionSettings(), SamplerSettings(respacing="2"))
    metadata = {"settings": {}, "nfe": 0, "flops": 0, "seconds": 0.0, "num_timed_batches": 0}
    sampling_run = run.SamplingRun(
        config=replace(parse_sample_config([]), output=tmp_path), checkpoint=tmp_path, network=None, metadata=metadata
    )
    for nfe in (2.0, 3.0, 4.0):
        sampling_run.record_batch(pipeline, nfe, 1.5)
    recorded = read_run_json(tmp_path)
    assert (recorded["nfe"], recorded["seconds"]) == (3.0, 4.5)
    assert recorded["flops"] == 3 * flops_per_evaluation(pipeline.network.settings)
