import pytest
import torch

from sagl.metrics import precision_recall as module
from sagl.metrics.precision_recall import precision_recall, radii


def drawn(count, width=8, seed=0, mean=0.0):
    return mean + torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def by_definition(made, real, k=3):
    """All distances in float64, written out."""

    def share(points, centres):
        among = torch.cdist(centres.double(), centres.double(), compute_mode="donot_use_mm_for_euclid_dist")
        reach = among.sort(dim=1).values[:, k]
        between = torch.cdist(points.double(), centres.double(), compute_mode="donot_use_mm_for_euclid_dist")
        return float((between <= reach).any(dim=1).double().mean())

    return share(made, real), share(real, made)


@pytest.mark.parametrize(("made", "real", "mean"), [(50, 70, 0.0), (200, 90, 1.0), (64, 64, 30.0), (90, 80, 1e4)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_it_is_the_definition(made, real, mean, k):
    a, b = drawn(made, seed=1, mean=mean), 1.2 * drawn(real, seed=2, mean=mean)
    assert precision_recall(a, b, neighbours=k) == pytest.approx(by_definition(a, b, k), abs=0)


def test_samples_on_the_surface_and_doubled_ones_are_the_definition_s():
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))  # many distances are equal
    a, b = torch.cat([grid, grid[:7]]), grid + torch.tensor([1.0, 0.0])
    assert precision_recall(a, b) == pytest.approx(by_definition(a, b), abs=0)


@pytest.mark.parametrize("tight", [1e-6, 1e-3, 1.0])
def test_two_collapsed_modes_far_apart_whose_insides_float32_cannot_tell_are_the_definition_s(tight):
    modes = torch.tensor([0.0, 3.0]).repeat(40)[:, None]
    a, b = (modes + tight * drawn(80, width=64, seed=seed) for seed in (1, 2))
    want = by_definition(a, b)
    assert 0 < min(want) <= max(want) < 1
    assert precision_recall(a, b) == pytest.approx(want, abs=0)


def test_parts_make_no_difference(monkeypatch):
    a, b = drawn(50, seed=1), drawn(70, seed=2)
    whole = precision_recall(a, b)
    monkeypatch.setattr(module, "DISTANCES_AT_ONCE", 200)
    assert precision_recall(a, b) == whole


def test_a_set_has_precision_and_recall_of_one_with_itself_and_none_with_one_far_away():
    a = drawn(40)
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a, a + 1000) == (0.0, 0.0)


def test_a_radius_reaches_to_the_third_other_sample():
    line = torch.tensor([[0.0], [1.0], [3.0], [6.0], [10.0]])
    assert radii(line).tolist() == [36, 25, 9, 25, 81]
    points = torch.tensor([[19.0], [19.5], [-6.0], [-6.5]])  # on the surface of the last and first ball, and beyond
    assert precision_recall(points, line).precision == 0.5
