"""The bundled network: its settings, and the quality of its images."""

import pytest
import torch

from sagl.data.fashion_mnist import PaddedFashionMNIST, prepare_fashion_mnist
from sagl.metrics.extractors import EXTRACTORS
from sagl.metrics.features import extract_features
from sagl.metrics.frechet import frechet_distance, statistics
from sagl.models.checkpoints import build_network, read_checkpoint
from sagl.models.zoo import BUNDLED
from sagl.sampling.pipeline import build_pipeline, make_labels, run_to_end
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings, SamplerSettings
from sagl.utils.files import cache_folder
from sagl.utils.images import to_float, to_uint8

NUM_IMAGES = 50


@pytest.fixture(scope="module")
def garments() -> PaddedFashionMNIST:
    prepare_fashion_mnist(cache_folder())
    return PaddedFashionMNIST(cache_folder(), train=False)


@pytest.fixture(scope="module")
def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Images of ten steps with the recommended guidance, five of each class, and their labels."""
    file, sampler = read_checkpoint(BUNDLED["fashion_mnist"]), SamplerSettings(sampler="unipc", respacing="logsnr10")
    pipeline = build_pipeline(
        build_network(file), file.diffusion, sampler, {"sag": SelfAttentionGuidance(**file.recommended["sag"])}
    )
    labels = make_labels(RunSettings(labels="balanced"), range(NUM_IMAGES), pipeline.network)
    with torch.inference_mode():
        x, _ = run_to_end(pipeline.sample_progressive(0, range(NUM_IMAGES), labels))
    return to_uint8(x), labels


def test_it_is_small_grey_conditional_and_has_a_null_label():
    file = read_checkpoint(BUNDLED["fashion_mnist"])
    assert BUNDLED["fashion_mnist"].stat().st_size <= 12e6
    assert {tensor.dtype for tensor in file.state_dict.values()} == {torch.float16}
    s = file.model_settings
    assert (s.image_size, s.in_channels, s.num_classes, s.null_label) == (32, 1, 10, True)
    assert {16, 8} <= set(s.attention_resolutions)
    assert next(build_network(file).parameters()).dtype == torch.float32


@pytest.mark.slow
def test_images_are_of_the_requested_class(samples, garments):
    """Of ten classes, the nearest mean image of real garments is the right one for most samples."""
    images, labels = samples
    means = torch.stack([to_float(garments.images[garments.labels == c]).mean(dim=0) for c in range(10)])
    suggest = torch.cdist(to_float(images).flatten(1), means.flatten(1)).argmin(dim=1)
    assert (suggest == labels).float().mean() >= 0.5


@pytest.mark.slow
def test_backgrounds_are_black_without_noise(samples):
    """The frame of two black pixels around every training image is black in the samples ones too."""
    images, _ = samples
    frame = images.clone()
    frame[..., 2:-2, 2:-2] = 0
    assert (frame > 40).float().mean() < 0.01


@pytest.mark.slow
def test_images_are_nearer_to_garments_than_noisy_garments_are(samples, garments):
    extract = EXTRACTORS["effnet_lite0_64"](torch.device("cpu"))
    real = statistics(extract_features(garments.images[:1000], extract).pooled)
    noisy = (
        garments.images[1000 : 1000 + NUM_IMAGES].float()
        + 40 * torch.randn(NUM_IMAGES, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    ).clamp(0, 255)
    distance = frechet_distance(statistics(extract_features(samples[0], extract).pooled), real)
    assert distance < frechet_distance(statistics(extract_features(noisy.to(torch.uint8), extract).pooled), real)
