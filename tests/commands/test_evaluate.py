import json

import numpy as np
import pytest
import torch

from sagl.metrics.features import EXTRACTORS
from sagl.metrics.frechet import frechet_distance, statistics
from tests.tiny import exit_code, write_fashion_mnist

TIMES = []


@pytest.fixture(autouse=True)
def tiny_extractor(monkeypatch, tmp_path):
    """Twelve features that cost nothing; a list of the images that were looked at, and a cache folder of the test's."""
    TIMES.clear()
    monkeypatch.setitem(EXTRACTORS, "effnet_lite0_64", lambda: twelve)
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))


def twelve(images_uint8):
    """Means of the first channel over twelve rows of pixels."""
    TIMES.append(len(images_uint8))
    return images_uint8[:, 0].float().mean(dim=2)[:, 2:14]


def write_npz(path, count, seed, side=16):
    images = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, arr_1=np.zeros(count, dtype=np.int64))
    return path, torch.from_numpy(images).permute(0, 3, 1, 2)


def evaluated(capsys, *arguments):
    """What the command printed."""
    assert exit_code("evaluate", *arguments) == 0
    return json.loads(capsys.readouterr().out)


def distance(a, b):
    return frechet_distance(statistics(twelve(a)), statistics(twelve(b)))


def test_the_distance_of_two_sets_is_printed_with_all_that_it_belongs_to(tmp_path, capsys):
    (run, images), (reference, others) = write_npz(tmp_path / "a.npz", 40, 0), write_npz(tmp_path / "b.npz", 50, 1)
    result = evaluated(capsys, run, "--reference", reference)
    assert result.pop("frechet_distance") == pytest.approx(distance(images, others), abs=1e-3)
    assert result.pop("seconds") >= 0
    assert result == {
        "extractor": "effnet_lite0_64",
        "run": str(run),
        "num_samples": 40,
        "reference": str(reference),
        "num_reference": 50,
    }
    assert evaluated(capsys, run, "--reference", run)["frechet_distance"] == pytest.approx(0, abs=1e-3)


def test_num_samples_takes_the_first_images_of_the_run_alone(tmp_path, capsys):
    (run, images), (reference, others) = write_npz(tmp_path / "a.npz", 40, 0), write_npz(tmp_path / "b.npz", 50, 1)
    result = evaluated(capsys, run, "--reference", reference, "--num_samples", 20)
    assert (result["num_samples"], result["num_reference"]) == (20, 50)
    assert result["frechet_distance"] == pytest.approx(distance(images[:20], others), abs=1e-3)


def test_a_run_folder_is_read_by_its_npz(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    write_npz(tmp_path / "run" / "samples_40x16x16x3.npz", 40, 0)
    reference, _ = write_npz(tmp_path / "b.npz", 50, 1)
    assert evaluated(capsys, tmp_path / "run", "--reference", reference)["num_samples"] == 40


def test_statistics_of_a_data_set_are_kept_and_used_again(tmp_path, capsys):
    write_fashion_mnist(tmp_path / "cache")
    run, _ = write_npz(tmp_path / "a.npz", 30, 0, side=32)
    first = evaluated(capsys, run)
    assert first["reference"] == "fashion_mnist_test"
    assert first["num_reference"] == 40
    assert sum(TIMES) == 30 + 40
    TIMES.clear()
    second = evaluated(capsys, run)
    assert sum(TIMES) == 30
    assert second["frechet_distance"] == first["frechet_distance"]


def test_a_data_set_is_measured_like_a_run(tmp_path, capsys):
    write_fashion_mnist(tmp_path / "cache")
    result = evaluated(capsys, "fashion_mnist_train", "--num_samples", 150)
    assert (result["num_samples"], result["num_reference"]) == (150, 40)


@pytest.mark.parametrize("wanted", [0, 1, 31, -3])
def test_a_count_that_the_run_does_not_have_or_that_has_no_spread_is_refused(wanted, tmp_path, capsys):
    run, _ = write_npz(tmp_path / "a.npz", 30, 0)
    assert exit_code("evaluate", run, "--reference", run, "--num_samples", wanted) == 2
    said = capsys.readouterr().err
    assert f"`num_samples` must be 2 … 30 for {run}, got {wanted}" in said
    assert said.count("\n") == 1


def test_a_reference_of_one_image_is_refused(tmp_path, capsys):
    run, _ = write_npz(tmp_path / "a.npz", 30, 0)
    reference, _ = write_npz(tmp_path / "one.npz", 1, 1)
    assert exit_code("evaluate", run, "--reference", reference) == 2
    assert "`reference`" in capsys.readouterr().err


def test_arrays_without_images_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert exit_code("evaluate", tmp_path / "statistics.npz") == 2
    assert "`run`" in capsys.readouterr().err
