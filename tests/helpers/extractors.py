"""Images and extractors that cost nothing, for tests of evaluations."""

import numpy as np
import torch
from PIL import Image

from sagl.evaluation.evaluate import evaluate
from sagl.metrics.extractors import EXTRACTORS
from sagl.metrics.features import Features
from sagl.settings.evaluation import ExtractionSettings, MetricSettings
from sagl.settings.sampling import DeviceSettings

BATCH_SIZES = []
"""Sizes of the batches that an extractor has received."""


def row_means(images_uint8):
    """Twelve features: means of the first channel over rows."""
    BATCH_SIZES.append(len(images_uint8))
    return images_uint8[:, 0].float().mean(dim=2)[:, 2:14]


def all_features(images_uint8):
    """All three kinds of features."""
    pooled = row_means(images_uint8)
    return Features(pooled, images_uint8[:, 1].float().mean(dim=1)[:, :9], pooled[:, :5] / 30)


def user_extractor(device):
    """Extractor factory of a user, given by its full name."""
    return row_means


USER_EXTRACTOR = f"{__name__}.user_extractor"


def use_fast_extractors(monkeypatch, cache):
    """Replace two extractors, and use an own cache folder."""
    BATCH_SIZES.clear()
    monkeypatch.setitem(EXTRACTORS, "effnet_lite0_64", lambda device: row_means)
    monkeypatch.setitem(EXTRACTORS, "inception", lambda device: all_features)
    monkeypatch.setenv("SAGL_CACHE", str(cache))


def serve_files(monkeypatch, folder):
    """Download the files of a folder in place of those of any host; return the list of addresses that are asked for."""
    addresses = []

    def download(url, target, *, check, **_):
        addresses.append(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / url.rpartition("/")[2]).read_bytes())
        check(target)
        return target

    monkeypatch.setattr("sagl.data.webdataset_files.download", download)
    return addresses


def random_images(count, seed, size=16):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def to_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def write_npz(path, count, seed, size=16):
    """Write random images and return the path and the images."""
    images = random_images(count, seed, size)
    np.savez(path, arr_0=images, arr_1=np.zeros(count, dtype=np.int64))
    return path, to_tensor(images)


def write_pair(folder):
    """Write a file of 40 images and one of 50, and return both paths and their images."""
    (run, images), (reference, others) = write_npz(folder / "a.npz", 40, 0), write_npz(folder / "b.npz", 50, 1)
    return run, reference, images, others


def write_folder(path, images, suffix=".png"):
    path.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(path / f"{k:03d}{suffix}")
    return path


def result_of(run, reference, *, extractor=None, image_size=None, batch_size=100, num_samples=None, **metrics):
    """Evaluate in this process, on the CPU."""
    return evaluate(
        str(run),
        str(reference),
        num_samples=num_samples,
        extraction=ExtractionSettings(
            extractor=extractor, image_size=image_size, batch_size=batch_size, progress="off"
        ),
        metrics=MetricSettings(**metrics),
        devices=DeviceSettings(accelerator="cpu", devices="1"),
    )
