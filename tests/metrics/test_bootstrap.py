import numpy as np
import pytest
import torch

from sagl.metrics.bootstrap import paired_difference, resample


def features(n=400, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean(rows):
    return float(rows.mean())


def interval(first, second, num_resamples=200, seed=0):
    """The paired interval of the difference of two means."""
    values = (resample(rows, mean, num_resamples=num_resamples, seed=seed) for rows in (first, second))
    return paired_difference(mean(second) - mean(first), *values)


def test_equal_features_have_no_difference():
    assert interval(features(), features()) == (0.0, 0.0, 0.0)


def test_the_interval_of_a_mean_is_the_normal_interval_of_the_paired_differences():
    first = 100 * features()
    second = first + 0.3 + 0.1 * features(seed=1)
    estimate, low, high = interval(first, second, num_resamples=2000)
    per_sample = (second - first).mean(dim=1).numpy()
    half = 1.96 * per_sample.std() / np.sqrt(len(per_sample))
    assert estimate == pytest.approx(per_sample.mean())
    assert low == pytest.approx(per_sample.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(per_sample.mean() + half, abs=0.1 * half)


def test_resamples_depend_on_the_seed():
    pair = features(seed=1), features(seed=2)
    assert interval(*pair) == interval(*pair)
    assert interval(*pair, seed=1) != interval(*pair)


def test_the_bias_of_resamples_does_not_move_the_interval_of_a_difference():
    first, second = torch.tensor([10.0, 11, 12, 13, 14]).double(), torch.tensor([22.0, 21, 23, 25, 24]).double()
    estimate, low, high = paired_difference(5.0, first, second)
    assert (low + high) / 2 == pytest.approx(estimate, abs=(high - low) / 2)
    values = second - first
    assert (low, high) == pytest.approx(tuple(np.quantile(values - values.mean() + 5, [0.025, 0.975])))


def test_the_sign_is_second_minus_first():
    assert all(end == pytest.approx(1) for end in interval(features(), features() + 1))
