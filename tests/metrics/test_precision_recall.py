import pytest
import torch

from sagl.metrics import precision_recall as module
from sagl.metrics.precision_recall import knn_radii, precision_recall


def random_features(count, width=8, seed=0, mean=0.0):
    return mean + torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def by_definition(fake, real, k=3):
    """All distances in float64, written out."""

    def fraction(points, centers):
        among = torch.cdist(centers.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist")
        radius = among.sort(dim=1).values[:, k]
        between = torch.cdist(points.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist")
        return float((between <= radius).any(dim=1).double().mean())

    return fraction(fake, real), fraction(real, fake)


@pytest.mark.parametrize(("fake", "real", "mean"), [(50, 70, 0.0), (200, 90, 1.0), (64, 64, 30.0), (90, 80, 1e4)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_result_is_that_of_float64_distances(fake, real, mean, k):
    a, b = random_features(fake, seed=1, mean=mean), 1.2 * random_features(real, seed=2, mean=mean)
    assert precision_recall(a, b, num_neighbors=k) == pytest.approx(by_definition(a, b, k), abs=0)


def test_samples_on_a_surface_and_duplicates_are_exact():
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))  # many distances are equal
    a, b = torch.cat([grid, grid[:7]]), grid + torch.tensor([1.0, 0.0])
    assert precision_recall(a, b) == pytest.approx(by_definition(a, b), abs=0)


@pytest.mark.parametrize("tight", [1e-6, 1e-3, 1.0])
def test_collapsed_modes_below_the_resolution_of_float32_are_exact(tight):
    modes = torch.tensor([0.0, 3.0]).repeat(40)[:, None]
    a, b = (modes + tight * random_features(80, width=64, seed=seed) for seed in (1, 2))
    expected = by_definition(a, b)
    assert 0 < min(expected) <= max(expected) < 1
    assert precision_recall(a, b) == pytest.approx(expected, abs=0)


def test_chunks_do_not_change_the_result(monkeypatch):
    a, b = random_features(50, seed=1), random_features(70, seed=2)
    whole = precision_recall(a, b)
    monkeypatch.setattr(module, "DISTANCES_PER_CHUNK", 200)
    assert precision_recall(a, b) == whole


def test_equal_sets_have_1_and_distant_sets_have_0():
    a = random_features(40)
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a, a + 1000) == (0.0, 0.0)


def test_a_radius_is_the_distance_to_the_third_neighbour():
    line = torch.tensor([[0.0], [1.0], [3.0], [6.0], [10.0]])
    assert knn_radii(line).tolist() == [36, 25, 9, 25, 81]
    points = torch.tensor([[19.0], [19.5], [-6.0], [-6.5]])  # on the surface of the last and first ball, and beyond
    assert precision_recall(points, line).precision == 0.5
