import numpy as np
import pytest
import torch

from sagl.metrics.kid import kernel_distance, squared_mmd


def drawn(count, width=6, seed=0, mean=0.0):
    return mean + torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def written_out(a, b):
    """Every pair in a loop, in NumPy's float64."""
    a, b = a.double().numpy(), b.double().numpy()

    def k(x, y):
        return (np.dot(x, y) / len(x) + 1) ** 3

    within = [np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    return sum(within) - 2 * np.mean([k(x, y) for x in a for y in b])


def test_the_estimate_is_that_of_every_pair():
    a, b = drawn(20, seed=1), drawn(15, seed=2, mean=0.5)
    assert squared_mmd(a, b) == pytest.approx(written_out(a, b), rel=1e-9)


def test_one_subset_of_all_is_the_estimate_and_has_no_deviation():
    a, b = drawn(20, seed=1), drawn(20, seed=2, mean=0.5)
    found = kernel_distance(a, b, subsets=3, size=20)
    assert found.mean == pytest.approx(squared_mmd(a, b), rel=1e-9)
    assert found.deviation == pytest.approx(0, abs=1e-12)


def test_equal_distributions_are_near_0_and_others_are_not():
    a, b = drawn(400, seed=1), drawn(400, seed=2)
    near = kernel_distance(a, b, subsets=20, size=100)
    assert abs(near.mean) < near.deviation
    assert kernel_distance(a, b + 0.5, subsets=20, size=100).mean > 10 * near.deviation


def test_the_seed_decides_the_subsets():
    a, b = drawn(60, seed=1), drawn(60, seed=2)
    first, again, other = (kernel_distance(a, b, subsets=5, size=20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
