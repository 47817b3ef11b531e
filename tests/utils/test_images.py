import numpy as np
import pytest
import torch
from torchvision.utils import make_grid

from sagl.utils.images import image_grid, save_png, to_float, to_rgb, to_uint8
from tests.helpers.files import read_png

BYTES = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


def test_bytes_are_spread_evenly_over_minus_one_to_one():
    x = to_float(BYTES)
    assert x.dtype == torch.float32
    assert (float(x.min()), float(x.max())) == (-1, 1)
    torch.testing.assert_close(x.flatten().double(), torch.linspace(-1, 1, 256, dtype=torch.float64), rtol=0, atol=1e-6)


def test_bytes_are_the_floor_of_the_public_formula():
    x = 3 * torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)) - 1.5
    expected = np.floor(np.clip((x.numpy() + np.float32(1)) * np.float32(127.5), 0, 255)).astype(np.uint8)
    assert torch.equal(to_uint8(x), torch.from_numpy(expected))
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0, 127, 255]


def test_converting_to_float_and_back_changes_a_byte_by_at_most_one():
    loss = BYTES.int() - to_uint8(to_float(BYTES)).int()
    assert set(loss.flatten().tolist()) <= {0, 1}


def test_gray_images_become_three_equal_channels_and_color_images_are_unchanged():
    rgb = to_rgb(BYTES)
    assert torch.equal(rgb, BYTES.expand(1, 3, 16, 16))
    color = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_rgb(color), color)


def flat(count, first, side=3, channels=3):
    """Images of one value each: first, first + 1, ..."""
    values = torch.arange(first, first + count, dtype=torch.uint8)
    return values[:, None, None, None].expand(count, channels, side, side)


def values_of(grid, *, columns, side=3, zoom=2):
    """The value of every cell, row by row; a cell must have one value."""
    side, step = zoom * side, zoom * side + 2
    rows = (grid.shape[1] - 2) // step
    starts = [[(2 + r * step, 2 + c * step) for c in range(columns)] for r in range(rows)]
    cells = [[grid[:, top : top + side, left : left + side] for top, left in row] for row in starts]
    assert all(int(cell.min()) == int(cell.max()) for row in cells for cell in row)
    return [[int(cell[0, 0, 0]) for cell in row] for row in cells]


def test_images_of_equal_index_are_below_each_other_gray_or_in_color():
    grid = image_grid([flat(3, 10, channels=1), flat(3, 20), flat(3, 30)])
    assert values_of(grid, columns=3) == [[10, 11, 12], [20, 21, 22], [30, 31, 32]]


def test_a_block_of_rows_is_as_wide_as_the_columns_and_filled_up_with_white():
    grid = image_grid([flat(5, 10), flat(5, 20)], columns=2)
    expected = [[10, 11], [20, 21], [12, 13], [22, 23], [14, 255], [24, 255]]
    assert values_of(grid, columns=2) == expected


@pytest.mark.parametrize(("side", "columns", "zoom"), [(1, 16, 2), (64, 16, 2), (65, 8, 1), (256, 8, 1)])
def test_small_images_are_doubled_sixteen_per_row_and_large_ones_unchanged_eight_per_row(side, columns, zoom):
    grid = image_grid([flat(columns + 1, 10, side, channels=1)])
    assert grid.shape == (3, 2 * (zoom * side + 2) + 2, columns * (zoom * side + 2) + 2)
    expected = [list(range(10, 10 + columns)), [10 + columns] + [255] * (columns - 1)]
    assert values_of(grid, columns=columns, side=side, zoom=zoom) == expected


@pytest.mark.parametrize(("width", "zoom"), [(4, 2), (65, 1)])
def test_enlarging_repeats_every_pixel_in_both_directions(width, zoom):
    images = torch.randint(0, 256, (2, 3, 3, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = image_grid([images])
    assert grid.shape == (3, 3 * zoom + 4, 2 * (width * zoom + 2) + 2)
    for image, left in zip(images, (2, width * zoom + 4), strict=True):
        part = grid[:, 2:-2, left : left + width * zoom]
        assert torch.equal(part, image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2))
    assert int(grid[:, 0].min()) == int(grid[:, :, 0].min()) == 255


def test_a_png_contains_every_byte_unchanged(tmp_path):
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    image = torch.cat([image, image.flip(1), image.flip(2)])
    save_png(image, tmp_path / "a.png")
    assert (read_png(tmp_path / "a.png") == image.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("count", [1, 3, 4, 12])
def test_a_grid_is_that_of_torchvision(count):
    images = torch.randint(0, 256, (count, 3, 65, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    columns = min(count, 4)
    expected = make_grid(images, nrow=columns, pad_value=255)
    assert torch.equal(image_grid([images], columns=columns), expected)
