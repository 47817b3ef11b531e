import pytest
import torch

from sagl.metrics.distance import FrechetDistance, InceptionScore
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


def logits(n=30, k=5):
    return 3 * torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def test_the_inception_score_is_its_definition():
    p = logits().double().softmax(dim=1)
    mean = p.mean(dim=0, keepdim=True)
    want = (p * (p / mean).log()).sum(dim=1).mean().exp()
    score = InceptionScore(5)
    for part in logits().split(7):
        score.update(part)
    assert float(score.compute()) == pytest.approx(float(want), rel=1e-12)


def test_the_inception_score_is_1_for_equal_images_and_the_number_of_classes_for_sure_and_even_ones():
    same, sure = InceptionScore(5), InceptionScore(5)
    same.update(logits(1).expand(9, -1))
    sure.update(1e4 * torch.eye(5).repeat(4, 1))
    assert float(same.compute()) == pytest.approx(1, rel=1e-12)
    assert float(sure.compute()) == pytest.approx(5, rel=1e-9)


def test_the_inception_score_of_two_processes_is_that_of_one():
    halves, whole = [InceptionScore(5), InceptionScore(5)], InceptionScore(5)
    for k, half in enumerate(halves):
        half.update(logits()[k::2])
    for name in whole._defaults:
        setattr(whole, name, whole._reductions[name](torch.stack([getattr(half, name) for half in halves])))
    whole.update(logits()[:0])  # as a process without images does
    alone = InceptionScore(5)
    alone.update(logits())
    assert float(whole.compute()) == pytest.approx(float(alone.compute()), rel=1e-12)
