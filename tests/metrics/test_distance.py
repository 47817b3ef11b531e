import pytest
import torch

from sagl.metrics.distance import FrechetDistance
from sagl.metrics.frechet import frechet_distance, statistics


def features(n, seed):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)) * 3 + seed


def test_pieces_in_any_order_give_the_distance_of_the_whole():
    real, made = features(50, 1), features(40, 2)
    metric = FrechetDistance(6)
    for part in made.split(7):
        metric.update(part, real=False)
    for part in real.split(20):
        metric.update(part, real=True)
    want = frechet_distance(statistics(real), statistics(made))
    assert float(metric.compute()) == pytest.approx(want, rel=1e-9)


def test_two_processes_count_as_one():
    real, made = features(50, 1), features(40, 2)
    halves = [FrechetDistance(6), FrechetDistance(6)]
    for k, metric in enumerate(halves):
        metric.update(real[k::2], real=True)
        metric.update(made[k::2], real=False)
    whole = FrechetDistance(6)
    for name in whole._defaults:  # as torchmetrics reduces the states of all processes
        setattr(whole, name, whole._reductions[name](torch.stack([getattr(half, name) for half in halves])))
    assert float(whole._statistics("made").mean[0]) == pytest.approx(float(made[:, 0].double().mean()))
    assert frechet_distance(whole._statistics("real"), whole._statistics("made")) == pytest.approx(
        frechet_distance(statistics(real), statistics(made)), rel=1e-9
    )


def test_the_made_set_can_be_begun_anew():
    real, made = features(50, 1), features(40, 2)
    metric = FrechetDistance(6)
    metric.update(real, real=True)
    metric.update(features(9, 7), real=False)
    before = float(metric.compute())
    metric.forget_made()
    metric.update(made, real=False)
    assert float(metric.compute()) == pytest.approx(frechet_distance(statistics(real), statistics(made)), rel=1e-9)
    assert float(metric.compute()) != before
