import pytest
import torch

from sagl.sampling.grid import colorize_masks, image_grid, save_png
from tests.helpers.tiny import read_png


def flat(count, first, side=3, channels=3):
    """Images of one value each: first, first + 1, ..."""
    values = torch.arange(first, first + count, dtype=torch.uint8)
    return values[:, None, None, None].expand(count, channels, side, side)


def values_of(grid, *, columns, side=3, zoom=2, padding=2):
    """The value of every cell, row by row; fails where a cell is not of one value."""
    side, step = zoom * side, zoom * side + padding
    rows = (grid.shape[1] - padding) // step
    starts = [[(padding + r * step, padding + c * step) for c in range(columns)] for r in range(rows)]
    cells = [[grid[:, top : top + side, left : left + side] for top, left in row] for row in starts]
    assert all(int(cell.min()) == int(cell.max()) for row in cells for cell in row)
    return [[int(cell[0, 0, 0]) for cell in row] for row in cells]


# ------------------------------------------------------------------------------------------------------- masks


def test_never_masked_is_black_and_always_masked_is_white():
    picture = colorize_masks(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2))
    assert (picture.shape, picture.dtype) == ((1, 3, 1, 2), torch.uint8)
    assert picture[0, :, 0, 0].tolist() == [0, 0, 0]
    assert picture[0, :, 0, 1].tolist() == [255, 255, 255]


def test_a_larger_share_is_brighter_all_the_way():
    colours = colorize_masks(torch.linspace(0, 1, 31).view(1, 1, 1, 31))[0, :, 0].double()
    brightness = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64) @ colours
    assert bool((brightness.diff() > 0).all())


def test_thirds_are_the_stops_and_between_them_is_a_straight_line():
    colours = colorize_masks(torch.tensor([1 / 3, 0.5, 2 / 3]).view(3, 1, 1, 1)).flatten(1).double()
    assert colours[0].tolist() == pytest.approx([38, 42, 110], abs=1)
    assert colours[2].tolist() == pytest.approx([222, 120, 40], abs=1)
    assert colours[1].tolist() == pytest.approx([130, 81, 75], abs=1)


# ------------------------------------------------------------------------------------------------------- grids


def test_what_belongs_together_is_under_each_other():
    grid = image_grid([flat(3, 10), flat(3, 20), flat(3, 30)])
    assert values_of(grid, columns=3) == [[10, 11, 12], [20, 21, 22], [30, 31, 32]]


def test_after_as_many_columns_as_fit_a_new_block_begins_and_is_filled_up_with_white():
    grid = image_grid([flat(5, 10), flat(5, 20)], columns=2)
    want = [[10, 11], [20, 21], [12, 13], [22, 23], [14, 255], [24, 255]]
    assert values_of(grid, columns=2) == want


@pytest.mark.parametrize(("side", "columns", "zoom"), [(1, 16, 2), (64, 16, 2), (65, 8, 1), (256, 8, 1)])
def test_small_images_are_doubled_and_sixteen_to_a_row_large_ones_as_they_are_and_eight(side, columns, zoom):
    grid = image_grid([flat(columns + 1, 10, side, channels=1)])
    assert grid.shape == (3, 2 * (zoom * side + 2) + 2, columns * (zoom * side + 2) + 2)
    want = [list(range(10, 10 + columns)), [10 + columns] + [255] * (columns - 1)]
    assert values_of(grid, columns=columns, side=side, zoom=zoom) == want


@pytest.mark.parametrize(("width", "zoom"), [(4, 2), (65, 1)])
def test_every_pixel_is_repeated_in_both_directions_or_neither(width, zoom):
    images = torch.randint(0, 256, (2, 3, 3, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = image_grid([images], padding=3)
    assert grid.shape == (3, 3 * zoom + 6, 2 * (width * zoom + 3) + 3)
    for image, left in zip(images, (3, width * zoom + 6), strict=True):
        found = grid[:, 3:-3, left : left + width * zoom]
        assert torch.equal(found, image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2))
    assert int(grid[:, 0].min()) == int(grid[:, :, 0].min()) == 255


def test_grey_rows_and_coloured_rows_go_together():
    grid = image_grid([flat(2, 40, channels=1), flat(2, 50)])
    assert grid.shape[0] == 3
    assert values_of(grid, columns=2) == [[40, 41], [50, 51]]


def test_a_png_holds_every_byte_as_it_is(tmp_path):
    picture = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    picture = torch.cat([picture, picture.flip(1), picture.flip(2)])
    save_png(picture, tmp_path / "a.png")
    assert (read_png(tmp_path / "a.png") == picture.permute(1, 2, 0).numpy()).all()


def test_a_png_may_say_near_its_beginning_who_made_it_and_is_otherwise_the_same(tmp_path):
    picture = flat(1, 40)[0]
    save_png(picture, tmp_path / "silent.png")
    save_png(picture, tmp_path / "signed.png", software="of mine")
    assert b"of mine" in (tmp_path / "signed.png").read_bytes()[:100]
    assert (read_png(tmp_path / "signed.png") == read_png(tmp_path / "silent.png")).all()
    assert b"tEXt" not in (tmp_path / "silent.png").read_bytes()
