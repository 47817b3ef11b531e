"""Evaluations by several processes over gloo on the CPU: whoever looks at the images, the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sagl.metrics.features import Features

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120


def bands(device):
    """All three kinds of features, from means of rows and of columns."""

    def extract(images_uint8):
        x = images_uint8.float()
        pooled, spatial = x.mean(dim=(1, 3)), x[:, 0].mean(dim=1)
        return Features(pooled, spatial, pooled[:, :4] / 20)

    return extract


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A run of 47 images and a folder of 30 pictures."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    np.savez(folder / "run.npz", arr_0=rng.integers(0, 256, (47, 16, 16, 3), dtype=np.uint8))
    (folder / "real").mkdir()
    for k in range(30):
        picture = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "real" / f"{k:02d}.png")
    return folder


def command(verb, *arguments, program=("-m", "sagl.cli")):
    words = [sys.executable, *program, verb, *arguments, "--extractor", "tests.commands.test_crew.bands"]
    return [str(word) for word in (*words, "--batch_size", 4, "--trainer.accelerator", "cpu", "--progress", "lines")]


def run(words, cache):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SAGL_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )


def numbers(done):
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    found = json.loads(done.stdout)
    found.pop("seconds")
    return found


def evaluated(images, cache, *flags):
    reference = ("--reference", images / "real", "--format", "json")
    return run(command("evaluate", images / "run.npz", *reference, *flags), cache)


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    return numbers(evaluated(images, tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_measure_what_one_does_to_the_last_digit(images, alone, tmp_path, processes):
    done = evaluated(images, tmp_path, "--trainer.devices", processes)
    assert numbers(done) == alone
    assert set(alone["numbers"]) == {"fd", "sfd", "is", "is_all", "precision", "recall", "kd"}
    assert "47/47 images" in done.stderr


def test_torchrun_starts_them_as_well(images, alone, tmp_path):
    program = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29617, "-m", "sagl.cli")
    words = command("evaluate", images / "run.npz", "--reference", images / "real", "--format", "json", program=program)
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["numbers"] == alone["numbers"]


def test_one_damaged_picture_ends_all_with_one_line(images, tmp_path):
    (tmp_path / "real").mkdir()
    for picture in (images / "real").iterdir():
        (tmp_path / "real" / picture.name).write_bytes(picture.read_bytes()[: None if picture.stem != "13" else 60])
    words = command("evaluate", images / "run.npz", "--reference", tmp_path / "real", "--trainer.devices", 2)
    done = run(words, tmp_path / "cache")
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if "images," not in line]
    assert len(said) == 1
    assert "13.png cannot be read" in said[0]


def test_statistics_of_two_processes_are_those_of_one(images, tmp_path):
    for processes in (1, 2):
        output = tmp_path / f"{processes}.npz"
        done = run(command("statistics", images / "real", "--output", output, "--trainer.devices", processes), tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (np.load(tmp_path / f"{processes}.npz") for processes in (1, 2))
    assert all(np.array_equal(one[name], two[name]) for name in one.files)
