import numpy as np
import pytest
import torch

from sagl.metrics.bootstrap import paired_interval


def features(n=400, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean(rows):
    return float(rows.mean())


def test_equal_features_have_no_difference():
    assert paired_interval(features(), features(), mean) == (0.0, 0.0, 0.0)


def test_the_interval_of_a_mean_is_the_normal_interval_of_the_paired_differences():
    first = 100 * features()
    second = first + 0.3 + 0.1 * features(seed=1)
    estimate, low, high = paired_interval(first, second, mean, num_resamples=2000)
    per_sample = (second - first).mean(dim=1).numpy()
    half = 1.96 * per_sample.std() / np.sqrt(len(per_sample))
    assert estimate == pytest.approx(per_sample.mean())
    assert low == pytest.approx(per_sample.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(per_sample.mean() + half, abs=0.1 * half)


def test_resamples_depend_on_the_seed():
    first, second = features(seed=1), features(seed=2)
    assert paired_interval(first, second, mean, num_resamples=20) == paired_interval(
        first, second, mean, num_resamples=20
    )
    assert paired_interval(first, second, mean, num_resamples=20, seed=1) != paired_interval(
        first, second, mean, num_resamples=20
    )


@pytest.mark.parametrize("swapped", [False, True])
def test_the_sign_is_second_minus_first(swapped):
    pair = (features(), features() + 1)
    interval = paired_interval(*(reversed(pair) if swapped else pair), mean)
    assert all(end == pytest.approx(-1 if swapped else 1) for end in interval)
