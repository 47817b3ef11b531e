import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import memorisation, sharpness
from benchmarks.memorisation import nearest, share_below
from benchmarks.sharpness import fine_energy, total_variation
from sagl.utils.images import image_grid
from tests.helpers.extractors import use_fast_extractors, write_npz


def test_the_nearest_training_image_is_that_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    points, train = torch.randn(150, 7, generator=generator) + 50, torch.randn(40, 7, generator=generator) + 50
    distances, indices = nearest(points, train)
    pairs = (points.double()[:, None] - train.double()).norm(dim=2)
    assert torch.equal(indices, pairs.argmin(dim=1))
    assert torch.allclose(distances.double(), pairs.min(dim=1).values, rtol=1e-5)


def test_the_share_has_the_interval_of_wilson():
    share = share_below(torch.arange(100.0), 10)
    assert (share.value, share.low, share.high) == pytest.approx((0.1, 0.0552, 0.1744), abs=1e-4)


def test_copies_of_training_images_are_closer_than_all_test_images(tmp_path, monkeypatch, capsys):
    use_fast_extractors(monkeypatch, tmp_path / "cache")
    (train, images), (test, _) = write_npz(tmp_path / "train.npz", 40, 0), write_npz(tmp_path / "test.npz", 50, 1)
    arguments = (train, "--train", train, "--test", test, "--output", tmp_path / "nearest.png")
    monkeypatch.setattr(sys, "argv", ["memorisation.py", *map(str, arguments)])
    memorisation.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| pixels", "| effnet"))]
    assert [row.count("100.0% (") for row in rows] == [2, 2]
    assert [row.split(" | ")[1] for row in rows] == ["0.00", "0.00"]
    with Image.open(tmp_path / "nearest.png") as picture:
        pixels, grid = np.array(picture), image_grid([images[:32]] * 3, 8).permute(1, 2, 0)
    margin = pixels.shape[1] - grid.shape[1]
    assert np.array_equal(pixels[:, margin:], grid)
    rows = np.split(pixels[1:-1, :margin], 12)
    assert all(row.min() < 100 for row in rows)
    assert not np.array_equal(rows[0], rows[1])


def test_sharpness_is_that_of_its_formulas():
    images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    expected = [(i[:, 1:] - i[:, :-1]).abs().mean() + (i[:, :, 1:] - i[:, :, :-1]).abs().mean() for i in images]
    assert torch.allclose(total_variation(images), torch.stack(expected))
    offsets = torch.arange(-5, 6)
    kernel = torch.exp(-offsets.double().square() / (2 * 1.5**2))
    kernel /= kernel.sum()
    padded = torch.nn.functional.pad(images.double(), (5, 5, 5, 5), mode="reflect")
    blurred = torch.einsum("nchwkl,k,l->nchw", padded.unfold(2, 11, 1).unfold(3, 11, 1), kernel, kernel)
    assert torch.allclose(fine_energy(images, 1.5).double(), (images - blurred).square().mean(dim=(1, 2, 3)))


def test_blurred_images_are_less_sharp(monkeypatch, tmp_path, capsys):
    images = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(sharpness, "read_pairs", lambda run: (images, images / 2))
    monkeypatch.setattr(sys, "argv", ["sharpness.py", str(tmp_path)])
    sharpness.main()
    lines = capsys.readouterr().out.splitlines()
    assert ": -75.0% (" in lines[1]
    assert ": -50.0% (" in lines[2]
