from functools import cache

import pytest
import torch

from sagl.guidance.sag import gaussian_blur
from sagl.metrics.extractors import EXTRACTORS
from sagl.metrics.features import describe_resize, extract_features
from sagl.metrics.frechet import frechet_distance, statistics
from sagl.utils.images import to_float, to_uint8

COUNT = 60
CPU = torch.device("cpu")


@cache
def extractor(name="effnet_lite0_64"):
    return EXTRACTORS[name](CPU)


@cache
def images(seed=0):
    """Boxes and discs of many sizes on grey: (COUNT, 1, 32, 32) uint8."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    samples = []
    for k in range(COUNT):
        cy, cx, half, intensity = torch.rand(4, generator=g) * torch.tensor([12, 12, 8, 150]) + torch.tensor(
            [10, 10, 4, 90]
        )
        inside = (x - cx).abs().maximum((y - cy).abs()) < half if k % 2 else (x - cx) ** 2 + (y - cy) ** 2 < half**2
        texture = 25 * torch.sin(x * (1 + k % 5) / 2)
        samples.append(torch.where(inside, intensity + texture, torch.tensor(20.0)))
    return torch.stack(samples)[:, None].clamp(0, 255).to(torch.uint8)


@cache
def reference():
    return statistics(extract_features(images(), extractor()).pooled)


def distance(changed):
    return frechet_distance(statistics(extract_features(changed, extractor()).pooled), reference())


def noisy(amount):
    noise = torch.randn(COUNT, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    return to_uint8(to_float(images()) + amount * noise)


def blurred(sigma):
    return to_uint8(gaussian_blur(to_float(images()), 13, sigma))


@pytest.mark.parametrize("shape", [(3, 1, 32, 32), (3, 3, 48, 40)])
def test_effnet_lite0_gives_1280_features_of_grey_and_of_coloured_images(shape):
    images_uint8 = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = extract_features(images_uint8, extractor()).pooled
    assert (features.shape, features.dtype) == ((3, 1280), torch.float32)
    assert bool(features.isfinite().all())
    assert float(features.std()) > 0.01


def test_a_single_channel_is_repeated():
    grey = images()[:4]
    assert torch.equal(extractor()(grey).pooled, extractor()(grey.expand(-1, 3, -1, -1)).pooled)


def test_features_do_not_depend_on_the_batch(monkeypatch):
    alone = [extractor()(image[None]) for image in images()[:7]]
    monkeypatch.setattr("sagl.metrics.features.BATCH_SIZE", 3)
    features = extract_features(images()[:7], extractor())
    for name in ("pooled", "logits"):
        together = torch.cat([getattr(one, name) for one in alone])
        torch.testing.assert_close(getattr(features, name), together, rtol=1e-4, atol=1e-4)
    assert features.spatial is None


def test_the_image_size_is_part_of_the_extractor():
    assert describe_resize(extractor()) == "bilinear to 64×64"
    assert not torch.allclose(
        extractor()(images()[:2]).pooled, extractor("effnet_lite0_224")(images()[:2]).pooled, atol=0.05
    )


@pytest.mark.slow
def test_the_distance_grows_with_noise_and_blur():
    noise = [distance(noisy(amount)) for amount in (0.05, 0.2, 0.6)]
    assert distance(images()) < 0.01 < noise[0] < noise[1] < noise[2]
    blur = [distance(blurred(sigma)) for sigma in (0.5, 1.0, 2.5)]
    assert 0.01 < blur[0] < blur[1] < blur[2]
    assert distance(images(seed=1)) < noise[2]


def test_the_logits_are_those_of_the_whole_network():
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = extractor().network((x.float() - 127) / 128)
        torch.testing.assert_close(extractor()(x).logits, whole, rtol=1e-4, atol=1e-4)
