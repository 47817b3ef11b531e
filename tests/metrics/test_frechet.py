import numpy as np
import pytest
import scipy.linalg
import torch

from sagl.metrics.frechet import CovarianceAccumulator, FrechetReference, Statistics, frechet_distance, statistics


def gaussian(mean, covariance):
    return Statistics(
        mean=torch.as_tensor(mean, dtype=torch.float64),
        covariance=torch.as_tensor(covariance, dtype=torch.float64),
        num_samples=1000,
    )


def features(count, width, seed, *, shift=0.0, rank=None):
    """Features with correlations, in float32 as extractors give them."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or width, width, generator=g) / width**0.5
    return torch.randn(count, rank or width, generator=g) @ mixing + shift


def distance_by_nuclear_norm(x, y):
    """The distance from samples: tr sqrt(C_x C_y) is the sum of the singular values of X_c Y_c^T, over both N - 1."""
    x, y = x.double().numpy(), y.double().numpy()
    x_c, y_c = x - x.mean(0), y - y.mean(0)
    scale = np.sqrt((len(x) - 1) * (len(y) - 1))
    shared = np.linalg.svd(x_c @ y_c.T, compute_uv=False).sum() / scale
    traces = (x_c**2).sum() / (len(x) - 1) + (y_c**2).sum() / (len(y) - 1)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * shared


def test_statistics_are_the_mean_and_the_unbiased_covariance_in_float64():
    x = features(30, 7, 0, shift=2.0)
    s = statistics(x)
    assert s.num_samples == 30
    assert s.mean.dtype == s.covariance.dtype == torch.float64
    np.testing.assert_allclose(s.mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(s.covariance, np.cov(x.double().numpy().T), rtol=1e-10)


def test_a_large_mean_does_not_reduce_the_precision():
    x = features(200, 5, 0)
    far = (1e4 + x).float()
    torch.testing.assert_close(statistics(far).covariance, torch.cov((far.double() - 1e4).T), rtol=1e-7, atol=0)
    accumulator, farther = CovarianceAccumulator(), x.double() + 1e7
    for part in farther.split(7):
        accumulator.add(part)
    np.testing.assert_allclose(accumulator.statistics().covariance, statistics(farther).covariance, rtol=1e-8)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (([0.0], [[1.0]]), ([3.0], [[1.0]]), 9.0),
        (([0.0], [[4.0]]), ([0.0], [[9.0]]), 1.0),
        (([1.0, 2.0], [[1.0, 0.0], [0.0, 4.0]]), ([1.0, 5.0], [[9.0, 0.0], [0.0, 0.25]]), 9 + 4 + 2.25),
        (([0.0] * 6, np.eye(6)), ([0.0] * 6, 4 * np.eye(6)), 6.0),
        (([0.0, 0.0], [[1.0, 0.0], [0.0, 0.0]]), ([0.0, 0.0], [[0.0, 0.0], [0.0, 1.0]]), 2.0),
        (([0.0, 0.0], np.zeros((2, 2))), ([3.0, 4.0], np.eye(2)), 25 + 2),
    ],
)
def test_gaussians_whose_distance_is_known(a, b, expected):
    assert frechet_distance(gaussian(*a), gaussian(*b)) == pytest.approx(expected, rel=1e-12)


def test_the_distance_is_invariant_under_rotation():
    a, b = features(300, 6, 0), features(300, 6, 1, shift=1.0)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    rotated = frechet_distance(statistics(a.double() @ rotation), statistics(b.double() @ rotation))
    assert rotated == pytest.approx(frechet_distance(statistics(a), statistics(b)), rel=1e-10)


def test_a_well_conditioned_case_agrees_with_a_matrix_square_root():
    x, y = features(500, 16, 0), features(400, 16, 1, shift=0.3)
    a, b = statistics(x), statistics(y)
    c_a, c_b = a.covariance.numpy(), b.covariance.numpy()
    root = scipy.linalg.sqrtm(c_a @ c_b)
    expected = ((a.mean - b.mean).numpy() ** 2).sum() + np.trace(c_a + c_b - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (features(20, 64, 0), features(20, 64, 1)),
        (features(40, 300, 0), features(25, 300, 1)),
        (features(40, 300, 0), features(400, 300, 1)),
        (features(100, 1280, 0), features(80, 1280, 1)),
        (features(500, 96, 0, rank=10), features(500, 96, 1, rank=30, shift=0.1)),
        (features(40, 300, 0), features(40, 300, 0) + 0.1 * features(40, 300, 1)),
        *(
            (features(n, width, 0), features(n + 9, width, 1, shift=0.1))
            for n, width in ((40, 512), (40, 700), (1300, 512), (1300, 700))
        ),
    ],
    ids=lambda x: "x".join(map(str, x.shape)),
)
def test_covariances_also_singular_ones_agree_with_the_nuclear_norm_of_the_samples(x, y):
    s = statistics(x)
    np.testing.assert_allclose(s.covariance, np.cov(x.double().numpy().T), rtol=1e-9, atol=1e-12)
    assert frechet_distance(s, statistics(y)) == pytest.approx(distance_by_nuclear_norm(x, y), rel=1e-6)


@pytest.mark.parametrize(("count", "width"), [(500, 16), (40, 100)])
def test_the_distance_is_symmetric(count, width):
    a, b = statistics(features(count, width, 0)), statistics(features(count, width, 1, shift=0.2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-7)


@pytest.mark.parametrize(("count", "width"), [(500, 16), (40, 100)])
def test_the_distance_of_equal_gaussians_is_zero(count, width):
    a = statistics(features(count, width, 0))
    assert 0 <= frechet_distance(a, a) <= 1e-6 * float(a.covariance.trace())


def test_the_distance_grows_with_that_of_the_means():
    a = statistics(features(100, 12, 0))
    distances = [frechet_distance(a, statistics(features(100, 12, 1, shift=shift))) for shift in (0, 0.1, 0.5, 2)]
    assert distances == sorted(distances)
    assert distances[-1] - distances[0] == pytest.approx(12 * 4, rel=0.3)


@pytest.mark.parametrize("num_real", [30, 200])
@pytest.mark.parametrize("num_rows", [20, 120])
def test_the_distances_of_resamples_are_those_of_their_statistics(num_real, num_rows):
    reference = FrechetReference(statistics(features(num_real, 50, 0)))  # 30 features have a singular covariance
    rows, generator = features(num_rows, 50, 1, shift=0.5), torch.Generator().manual_seed(2)
    resamples = [torch.randint(num_rows, (num_rows,), generator=generator) for _ in range(3)]
    expected = [reference(statistics(rows[index])) for index in resamples]
    assert reference.of_resamples(rows, resamples).tolist() == pytest.approx(expected, rel=1e-7)
    assert reference.of_resamples(rows, []).shape == (0,)
