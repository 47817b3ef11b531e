from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from sagl.sampling.grid import colorize_masks, image_grid
from sagl.sampling.strip import GIF_MILLISECONDS, Frame, kept_steps, write_strip
from sagl.utils.images import to_rgb
from tests.helpers.tiny import contents, read_png


def frame(step, *, masked=True, channels=1, batch=2):
    """A step of a few chains; every frame looks different, and black and white so that a gif keeps every pixel."""
    generator = torch.Generator().manual_seed(step)
    x0_hat = 255 * torch.randint(0, 2, (batch, 1, 8, 8), dtype=torch.uint8, generator=generator)
    mask = torch.rand(batch, 1, 8, 8, generator=generator) < 0.5
    return Frame(step=step, x0_hat=x0_hat.expand(-1, channels, -1, -1), mask=mask if masked else None)


def rows_of(frames, i):
    """Estimates and masks of one chain, in time: twice (T, 3, H, W)."""
    none = torch.zeros(1, 1, 8, 8)
    masks = [none if f.mask is None else f.mask[i : i + 1].float() for f in frames]
    x0_predictions = torch.cat([f.x0_hat[i : i + 1] for f in frames])
    return to_rgb(x0_predictions), colorize_masks(torch.cat(masks))


def gif_frames(path):
    """Each picture of a gif, (H, W, 3), and how long it is shown."""
    with PILImage.open(path) as gif:
        assert gif.info["loop"] == 0
        for k in range(gif.n_frames):
            gif.seek(k)
            yield np.asarray(gif.convert("RGB")), gif.info["duration"]


@pytest.mark.parametrize("columns", [2, 3, 10])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 9, 10, 11, 25, 250, 1000])
def test_steps_are_kept_from_the_noisiest_to_the_cleanest_evenly_spread(num_steps, columns):
    kept = kept_steps(num_steps, columns)
    assert len(kept) == min(num_steps, columns)
    assert (kept[0], kept[-1]) == (num_steps - 1, 0)
    gaps = [a - b for a, b in pairwise(kept)]
    assert min(gaps, default=1) >= 1
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_time_goes_to_the_right_and_each_sample_is_above_its_masks(channels, tmp_path):
    frames = [frame(9, masked=False, channels=channels), *(frame(step, channels=channels) for step in (4, 2, 0))]
    write_strip(frames, tmp_path / "new")
    want = image_grid([*rows_of(frames, 0), *rows_of(frames, 1)], columns=4)
    assert (read_png(tmp_path / "new" / "strip.png") == want.permute(1, 2, 0).numpy()).all()
    assert want.shape == (3, 4 * 18 + 2, 4 * 18 + 2)


def test_more_frames_than_a_grid_has_columns_stay_in_one_row(tmp_path):
    write_strip([frame(step, masked=False, batch=1) for step in range(20)], tmp_path)
    assert read_png(tmp_path / "strip.png").shape == (18 + 2, 20 * 18 + 2, 3)


def test_without_masks_there_are_no_rows_for_them(tmp_path):
    frames = [frame(step, masked=False) for step in (3, 0)]
    write_strip(frames, tmp_path)
    want = image_grid([rows_of(frames, 0)[0], rows_of(frames, 1)[0]], columns=2)
    assert (read_png(tmp_path / "strip.png") == want.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("masked", [True, False])
def test_the_gif_has_a_picture_a_step_with_the_samples_beside_each_other_and_rests_at_the_end(masked, tmp_path):
    frames = [frame(step, masked=masked) for step in (9, 4, 0)]
    write_strip(frames, tmp_path)
    shown = list(gif_frames(tmp_path / "strip.gif"))
    assert [duration for _, duration in shown] == [GIF_MILLISECONDS] * 2 + [10 * GIF_MILLISECONDS]
    for (picture, _), f in zip(shown, frames, strict=True):
        rows = [to_rgb(f.x0_hat)] + ([colorize_masks(f.mask.float())] if masked else [])
        assert (picture == image_grid(rows).permute(1, 2, 0).numpy()).all()


def test_one_frame_is_a_strip_too_and_nothing_else_is_left(tmp_path):
    write_strip([frame(0)], tmp_path)
    assert {path.name for path in contents(tmp_path)} == {"strip.png", "strip.gif"}
    assert len(list(gif_frames(tmp_path / "strip.gif"))) == 1
