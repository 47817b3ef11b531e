import numpy as np
import pytest
import torch

from sagl.utils.images import to_float, to_rgb, to_uint8

BYTES = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


def test_bytes_span_minus_one_to_one_evenly():
    x = to_float(BYTES)
    assert x.dtype == torch.float32
    assert (float(x.min()), float(x.max())) == (-1, 1)
    torch.testing.assert_close(x.flatten().double(), torch.linspace(-1, 1, 256, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "byte"),
    [(-1, 0), (1, 255), (0, 127), (-1.7, 0), (3.0, 255), (0.9999, 254), (-0.9922, 0), (-0.992, 1), (0.0040, 128)],
)
def test_numbers_are_cut_down_to_bytes_and_clamped(value, byte):
    got = to_uint8(torch.full((1, 1, 1, 1), float(value)))
    assert got.dtype == torch.uint8
    assert int(got) == byte


def test_bytes_are_the_floor_of_the_public_formula():
    x = 3 * torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)) - 1.5
    want = np.floor(np.clip((x.numpy() + np.float32(1)) * np.float32(127.5), 0, 255)).astype(np.uint8)
    assert torch.equal(to_uint8(x), torch.from_numpy(want))


def test_the_trip_to_numbers_and_back_loses_at_most_one():
    """Which is why stored bytes never take it."""
    lost = BYTES.int() - to_uint8(to_float(BYTES)).int()
    assert set(lost.flatten().tolist()) <= {0, 1}


def test_grey_images_become_three_equal_channels():
    rgb = to_rgb(BYTES)
    assert rgb.shape == (1, 3, 16, 16)
    assert all(torch.equal(rgb[:, k : k + 1], BYTES) for k in range(3))


def test_colour_images_stay_as_they_are():
    colour = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_rgb(colour), colour)
