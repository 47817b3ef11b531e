from itertools import pairwise

import pytest

from sagl.diffusion.respacing import respaced_timesteps
from tests.helpers.errors import refused


@pytest.mark.parametrize(
    ("spec", "total", "expected"),
    [
        ("5", 10, [0, 2, 4, 7, 9]),
        ("1", 10, [0]),
        ("2", 10, [0, 9]),
        ("2,3", 10, [0, 4, 5, 7, 9]),
        ("1,1,1", 10, [0, 4, 7]),
        ("ddim5", 10, [0, 2, 4, 6, 8]),
        ("ddim4", 10, [0, 3, 6, 9]),
    ],
)
def test_a_respacing_gives_these_timesteps(spec, total, expected):
    assert respaced_timesteps(spec, total) == expected


@pytest.mark.parametrize("count", range(1, 101))
def test_a_number_gives_that_many_timesteps_with_first_and_last_included(count):
    timesteps = respaced_timesteps(str(count), 100)
    assert len(timesteps) == count == len(set(timesteps))
    assert timesteps == sorted(timesteps)
    assert timesteps[0] == 0
    assert timesteps[-1] == (99 if count > 1 else 0)


@pytest.mark.parametrize("count", [1, 2, 10, 50, 100])
def test_ddim_has_one_whole_stride(count):
    timesteps = respaced_timesteps(f"ddim{count}", 100)
    assert len(timesteps) == count
    assert timesteps[0] == 0
    assert len({b - a for a, b in pairwise(timesteps)}) <= 1


@pytest.mark.parametrize(
    "spec", ["0", "-5", "2.5", "many", "ddim", "ddim0", "10,,5", "101", "60,10", "ddim26", "ddim101"]
)
def test_an_impossible_respacing_is_refused_with_its_value(spec):
    with refused("`respacing`", repr(spec)):
        respaced_timesteps(spec, 100)
