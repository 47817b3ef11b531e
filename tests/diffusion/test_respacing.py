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


def increases_from_first_to_last(timesteps, count):
    """Whether these are so many of 100 timesteps in order, with the first and the last one."""
    return (
        len(timesteps) == count == len(set(timesteps))
        and timesteps == sorted(timesteps)
        and (timesteps[0], timesteps[-1]) == (0, 99 if count > 1 else 0)
    )


def test_a_number_gives_that_many_timesteps_with_first_and_last_included():
    timesteps = {count: respaced_timesteps(str(count), 100) for count in range(1, 101)}
    assert {n: values for n, values in timesteps.items() if not increases_from_first_to_last(values, n)} == {}


@pytest.mark.parametrize("log_snr", [None, [9 - 0.2 * t for t in range(100)], [10 / (1 + t) for t in range(100)]])
def test_logsnr_gives_that_many_timesteps_with_first_and_last_included(log_snr):
    counts = (2, 3, 10, 50, 99, 100)
    timesteps = {n: respaced_timesteps(f"logsnr{n}", 100, log_snr and (lambda: log_snr)) for n in counts}
    assert {n: values for n, values in timesteps.items() if not increases_from_first_to_last(values, n)} == {}


def test_logsnr_is_evenly_spaced_where_timesteps_are_dense_enough():
    log_snr = [-10 * (t / 999) ** 0.5 for t in range(1000)]
    values = [log_snr[t] for t in respaced_timesteps("logsnr11", 1000, lambda: log_snr)]
    assert values == pytest.approx([-float(k) for k in range(11)], abs=0.05)


@pytest.mark.parametrize("count", [1, 2, 10, 50, 100])
def test_ddim_has_one_whole_stride(count):
    timesteps = respaced_timesteps(f"ddim{count}", 100)
    assert len(timesteps) == count
    assert timesteps[0] == 0
    assert len({b - a for a, b in pairwise(timesteps)}) <= 1


@pytest.mark.parametrize(
    "spec",
    [
        "logsnr",
        "logsnr0",
        "logsnr1",
        "logsnr101",
        "0",
        "-5",
        "2.5",
        "many",
        "ddim",
        "ddim0",
        "10,,5",
        "101",
        "60,10",
        "ddim26",
        "ddim101",
        "٢",
        "ddim" + "9" * 5000,
        "9" * 5000,
        "2.0",
        "1e1",
        ",",
        "",
    ],
)
def test_an_impossible_respacing_is_refused_with_its_value(spec):
    with refused("`respacing`", repr(spec)[:20]):
        respaced_timesteps(spec, 100)
