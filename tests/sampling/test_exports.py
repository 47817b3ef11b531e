import tracemalloc
import zipfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from sagl.errors import UserError
from sagl.sampling.exports import (
    GIF_MILLISECONDS,
    Frame,
    colorize_masks,
    draw_strip,
    evenly_spaced_steps,
    npz_name,
    write_grid,
    write_images,
    write_npz,
)
from sagl.sampling.run_folder import Sample, encode_png, write_shard
from sagl.utils.images import image_grid, to_rgb
from tests.helpers.files import contents, read_png


def random_images(count, seed=0, side=8):
    """(N, H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write_run(folder, rows, *, batch=4):
    """Write a run of these arrays with labels 5, 6, …; return the folder."""
    files = {name: [encode_png(image) for image in row] for name, row in rows.items()}
    ids = range(len(rows["samples"]))
    for start in ids[::batch]:
        part = [
            Sample(id=i, label=5 + i, seed=0, pngs={name: row[i] for name, row in files.items()})
            for i in ids[start : start + batch]
        ]
        write_shard(folder, part)
    return folder


def as_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("count", "batch"), [(1, 4), (4, 4), (6, 4), (6, 1)])
def test_an_npz_is_what_numpy_saves_of_the_first_images_for_shards_of_any_size(count, batch, tmp_path):
    images = random_images(6)
    write_npz(write_run(tmp_path / "run", {"samples": images}, batch=batch), tmp_path / "a.npz", count)
    np.savez(tmp_path / "b.npz", images[:count], np.arange(5, 5 + count))
    with zipfile.ZipFile(tmp_path / "a.npz") as actual, zipfile.ZipFile(tmp_path / "b.npz") as expected:
        assert actual.namelist() == expected.namelist() == ["arr_0.npy", "arr_1.npy"]
        assert all(actual.read(name) == expected.read(name) for name in expected.namelist())
    with np.load(tmp_path / "a.npz") as arrays:
        assert (arrays["arr_0"].dtype, arrays["arr_0"].shape) == (np.uint8, (count, 8, 8, 3))
        assert (arrays["arr_1"].dtype, arrays["arr_1"].tolist()) == (np.int64, list(range(5, 5 + count)))


def test_the_memory_for_an_npz_does_not_grow_with_the_run(tmp_path):
    peaks = {}
    for count in (4, 8, 80):  # the first one fills caches
        run = write_run(tmp_path / str(count), {"samples": random_images(count, side=48)})
        tracemalloc.start()
        write_npz(run, tmp_path / "a.npz", count)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[80] < 1.5 * peaks[8] < 80 * 48 * 48 * 3


@pytest.mark.parametrize("count", [0, 3])
def test_an_npz_of_more_images_than_the_run_has_is_refused_and_leaves_nothing(count, tmp_path):
    if count:
        write_run(tmp_path, {"samples": random_images(count)})
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"`run`.*4.*{count}"):
        write_npz(tmp_path, tmp_path / "a.npz", 4)
    assert contents(tmp_path) == before


def test_the_name_of_an_npz_contains_its_shape(tmp_path):
    assert npz_name(write_run(tmp_path, {"samples": random_images(2, side=16)}), 2) == "samples_2x16x16x3.npz"


@pytest.mark.parametrize("masks", [True, False])
def test_a_grid_has_unguided_images_above_the_samples_above_their_masks(masks, tmp_path):
    mask_frequencies = random_images(6, seed=3)[..., :1].repeat(3, axis=-1)
    rows = {"samples": random_images(6), "unguided": random_images(6, seed=1)} | (
        {"masks": mask_frequencies} if masks else {}
    )
    write_grid(write_run(tmp_path / "run", rows), tmp_path / "new" / "grid.png")
    expected = [as_tensor(rows["unguided"]), as_tensor(rows["samples"])]
    expected += [colorize_masks(as_tensor(mask_frequencies)[:, :1] / 255)] if masks else []
    assert (read_png(tmp_path / "new" / "grid.png") == image_grid(expected).permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(("num_samples", "shown"), [(3, 3), (None, 256), (300, 256)])
def test_a_grid_shows_at_most_256_samples(num_samples, shown, tmp_path):
    images = random_images(300, side=2)
    write_grid(write_run(tmp_path, {"samples": images}, batch=300), tmp_path / "grid.png", num_samples)
    expected = image_grid([as_tensor(images[:shown])]).permute(1, 2, 0).numpy()
    assert np.array_equal(read_png(tmp_path / "grid.png"), expected)


def test_a_grid_of_an_empty_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="`run`"):
        write_grid(tmp_path, tmp_path / "grid.png")


@pytest.mark.parametrize("num_samples", [None, 5])
def test_images_have_the_bytes_of_the_shards_and_are_named_by_their_ids(num_samples, tmp_path):
    images = random_images(6)
    write_images(write_run(tmp_path / "run", {"samples": images, "unguided": images}), tmp_path / "images", num_samples)
    actual = {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert actual == {f"{i:06d}.png": encode_png(image) for i, image in enumerate(images[:num_samples])}


def test_mask_frequencies_are_brighter_the_larger_with_straight_lines_between_the_color_stops():
    colors = colorize_masks(torch.linspace(0, 1, 31).view(1, 1, 1, 31))[0, :, 0]
    assert colors.dtype == torch.uint8
    stops = [[0, 0, 0], [38, 42, 110], [130, 81, 75], [222, 120, 40], [255, 255, 255]]
    assert [pytest.approx(colors[:, k].tolist(), abs=1) for k in (0, 10, 15, 20, 30)] == stops
    brightness = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64) @ colors.double()
    assert bool((brightness.diff() > 0).all())


def frame(step, *, masked=True, channels=1, batch=2):
    """A step of a few samples, different for each step; black and white, because a gif keeps those exactly."""
    generator = torch.Generator().manual_seed(step)
    x0_hat = 255 * torch.randint(0, 2, (batch, 1, 8, 8), dtype=torch.uint8, generator=generator)
    mask = torch.rand(batch, 1, 8, 8, generator=generator) < 0.5
    return Frame(x0_hat=x0_hat.expand(-1, channels, -1, -1), mask=mask if masked else None)


def rows_of(frames, i):
    """Estimates and masks of one sample over time: twice (T, 3, H, W)."""
    none = torch.zeros(1, 1, 8, 8)
    masks = [none if f.mask is None else f.mask[i : i + 1].float() for f in frames]
    x0_predictions = torch.cat([f.x0_hat[i : i + 1] for f in frames])
    return to_rgb(x0_predictions), colorize_masks(torch.cat(masks))


def gif_frames(path):
    """Yield the frames of a gif, (H, W, 3), and their durations."""
    with PILImage.open(path) as gif:
        assert gif.info["loop"] == 0
        for k in range(gif.n_frames):
            gif.seek(k)
            yield np.asarray(gif.convert("RGB")), gif.info["duration"]


@pytest.mark.parametrize("columns", [2, 3, 10])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 9, 10, 11, 25, 250, 1000])
def test_steps_go_evenly_from_the_noisiest_to_the_cleanest(num_steps, columns):
    steps = evenly_spaced_steps(num_steps, columns)
    assert len(steps) == min(num_steps, columns)
    assert (steps[0], steps[-1]) == (num_steps - 1, 0)
    gaps = [a - b for a, b in pairwise(steps)]
    assert min(gaps, default=1) >= 1
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_time_goes_to_the_right_with_each_sample_above_its_masks_if_there_are_any(masked, channels, tmp_path):
    frames = [frame(step, masked=masked and step < 9, channels=channels) for step in (9, 4, 2, 0)]
    draw_strip(frames, tmp_path / "new")
    rows = [row for i in (0, 1) for row in rows_of(frames, i)[: 1 + masked]]
    expected = image_grid(rows, columns=4)
    assert (read_png(tmp_path / "new" / "strip.png") == expected.permute(1, 2, 0).numpy()).all()
    assert {path.name for path in contents(tmp_path)} == {"strip.png", "strip.gif"}


def test_all_frames_are_in_one_row_however_many(tmp_path):
    draw_strip([frame(step, masked=False, batch=1) for step in range(20)], tmp_path)
    assert read_png(tmp_path / "strip.png").shape == (18 + 2, 20 * 18 + 2, 3)


@pytest.mark.parametrize("num_frames", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_the_gif_has_a_frame_per_step_with_the_samples_side_by_side_and_a_longer_last_one(masked, num_frames, tmp_path):
    frames = [frame(step, masked=masked) for step in (9, 4, 0)[-num_frames:]]
    draw_strip(frames, tmp_path)
    shown = list(gif_frames(tmp_path / "strip.gif"))
    assert [duration for _, duration in shown] == [GIF_MILLISECONDS] * (num_frames - 1) + [10 * GIF_MILLISECONDS]
    for (image, _), f in zip(shown, frames, strict=True):
        rows = [to_rgb(f.x0_hat)] + ([colorize_masks(f.mask.float())] if masked else [])
        assert (image == image_grid(rows).permute(1, 2, 0).numpy()).all()
