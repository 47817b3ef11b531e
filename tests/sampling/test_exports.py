import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from sagl.errors import UserError
from sagl.sampling.exports import npz_name, write_grid, write_images, write_npz
from sagl.sampling.grid import colorize_masks, image_grid
from sagl.sampling.run_folder import Sample, png, write_shard
from tests.helpers.tiny import contents, read_png


def pictures(count, seed=0, side=8):
    """(N, H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def run_of(folder, rows, *, batch=4):
    """A run whose rows are these arrays, with labels 5, 6, …; returns the folder."""
    files = {name: [png(image) for image in row] for name, row in rows.items()}
    ids = range(len(rows["samples"]))
    for start in ids[::batch]:
        part = [
            Sample(id=i, label=5 + i, seed=0, pictures={name: row[i] for name, row in files.items()})
            for i in ids[start : start + batch]
        ]
        write_shard(folder, part)
    return folder


def as_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------------------------- npz


@pytest.mark.parametrize("count", [1, 4, 6])
def test_an_npz_is_what_numpy_would_have_saved_of_the_first_images(count, tmp_path):
    images = pictures(6)
    write_npz(run_of(tmp_path / "run", {"samples": images}), tmp_path / "a.npz", count)
    np.savez(tmp_path / "b.npz", images[:count], np.arange(5, 5 + count))
    with zipfile.ZipFile(tmp_path / "a.npz") as got, zipfile.ZipFile(tmp_path / "b.npz") as want:
        assert got.namelist() == want.namelist() == ["arr_0.npy", "arr_1.npy"]
        assert [got.read(name) for name in got.namelist()] == [want.read(name) for name in want.namelist()]
    with np.load(tmp_path / "a.npz") as arrays:
        assert (arrays["arr_0"].dtype, arrays["arr_0"].shape) == (np.uint8, (count, 8, 8, 3))
        assert (arrays["arr_1"].dtype, arrays["arr_1"].tolist()) == (np.int64, list(range(5, 5 + count)))


def test_the_same_images_give_the_same_npz_however_they_lie_in_shards(tmp_path):
    for batch in (1, 4):
        run = run_of(tmp_path / f"run{batch}", {"samples": pictures(6)}, batch=batch)
        write_npz(run, tmp_path / f"{batch}.npz", 6)
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "4.npz").read_bytes()


def test_the_memory_of_an_npz_does_not_grow_with_the_run(tmp_path):
    peaks = {}
    for count in (4, 8, 80):  # the first one fills caches
        run = run_of(tmp_path / str(count), {"samples": pictures(count, side=48)})
        tracemalloc.start()
        write_npz(run, tmp_path / "a.npz", count)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[80] < 1.5 * peaks[8] < 80 * 48 * 48 * 3


@pytest.mark.parametrize("there", [0, 3])
def test_an_npz_of_more_images_than_there_are_is_refused_and_leaves_nothing(there, tmp_path):
    if there:
        run_of(tmp_path, {"samples": pictures(there)})
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"`run` must hold 4 images, and .* holds {there}"):
        write_npz(tmp_path, tmp_path / "a.npz", 4)
    assert contents(tmp_path) == before


def test_the_name_of_an_npz_tells_its_shape(tmp_path):
    assert npz_name(run_of(tmp_path, {"samples": pictures(2, side=16)}), 2) == "samples_2x16x16x3.npz"


# -------------------------------------------------------------------------------------------------------- grid


@pytest.mark.parametrize("masks", [True, False])
def test_a_grid_has_unguided_images_above_the_samples_above_their_masks(masks, tmp_path):
    shares = pictures(6, seed=3)[..., :1].repeat(3, axis=-1)
    rows = {"samples": pictures(6), "unguided": pictures(6, seed=1)} | ({"masks": shares} if masks else {})
    write_grid(run_of(tmp_path / "run", rows), tmp_path / "new" / "grid.png")
    want = [as_tensor(rows["unguided"]), as_tensor(rows["samples"])]
    want += [colorize_masks(as_tensor(shares)[:, :1] / 255)] if masks else []
    assert (read_png(tmp_path / "new" / "grid.png") == image_grid(want).permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(("asked", "shown"), [(3, 3), (None, 256), (300, 256)])
def test_a_grid_shows_as_many_as_asked_and_never_more_than_256(asked, shown, tmp_path):
    images = pictures(300, side=2)
    write_grid(run_of(tmp_path, {"samples": images}, batch=300), tmp_path / "grid.png", asked)
    want = image_grid([as_tensor(images[:shown])]).permute(1, 2, 0).numpy()
    assert np.array_equal(read_png(tmp_path / "grid.png"), want)


def test_a_grid_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="`run` must hold images"):
        write_grid(tmp_path, tmp_path / "grid.png")


# ------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("asked", [None, 5])
def test_images_are_the_pngs_of_the_shards_byte_for_byte_by_their_ids(asked, tmp_path):
    images = pictures(6)
    write_images(run_of(tmp_path / "run", {"samples": images, "unguided": images}), tmp_path / "images", asked)
    got = {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert got == {f"{i:06d}.png": png(image) for i, image in enumerate(images[:asked])}
