import numpy as np
import pytest
import torch

from sagl.metrics.kid import kernel_distance, squared_mmd


def random_features(count, width=6, seed=0, mean=0.0):
    return mean + torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def by_definition(a, b):
    """Every pair in a loop, in NumPy's float64."""
    a, b = a.double().numpy(), b.double().numpy()

    def k(x, y):
        return (np.dot(x, y) / len(x) + 1) ** 3

    within = [np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    return sum(within) - 2 * np.mean([k(x, y) for x in a for y in b])


def test_the_estimate_is_the_sum_over_all_pairs():
    a, b = random_features(20, seed=1), random_features(15, seed=2, mean=0.5)
    assert squared_mmd(a, b) == pytest.approx(by_definition(a, b), rel=1e-9)


def test_a_subset_of_all_samples_has_no_deviation():
    a, b = random_features(20, seed=1), random_features(20, seed=2, mean=0.5)
    result = kernel_distance(a, b, num_subsets=3, subset_size=20)
    assert result.mean == pytest.approx(squared_mmd(a, b), rel=1e-9)
    assert result.std == pytest.approx(0, abs=1e-12)


def test_equal_distributions_are_near_0_and_different_ones_are_not():
    a, b = random_features(400, seed=1), random_features(400, seed=2)
    near = kernel_distance(a, b, num_subsets=20, subset_size=100)
    assert abs(near.mean) < near.std
    assert kernel_distance(a, b + 0.5, num_subsets=20, subset_size=100).mean > 10 * near.std


def test_the_seed_determines_the_subsets():
    a, b = random_features(60, seed=1), random_features(60, seed=2)
    first, again, other = (kernel_distance(a, b, num_subsets=5, subset_size=20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
