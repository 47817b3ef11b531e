import pytest
import torch

from sagl.metrics.feature_metrics import FeatureMetrics
from sagl.metrics.features import Features
from sagl.metrics.frechet import frechet_distance, statistics
from sagl.metrics.inception_score import inception_score

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)
REAL, FAKE = (torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=GENERATOR) for n in (50, 40))


def pooled(images):
    return images.float().flatten(1)[:, :6]


def with_logits(images):
    return Features(pooled(images), logits=pooled(images)[:, :3] / 50)


def metrics_of(extract, real=REAL):
    metrics = FeatureMetrics(extract, REAL[:1], CPU)
    for batch in real.split(20):
        metrics.update_real(batch)
    return metrics


def test_torchmetrics_computes_the_distance_and_the_score_of_all_images():
    results = metrics_of(with_logits).compute(FAKE.split(7))
    assert results["frechet"] == pytest.approx(frechet_distance(statistics(pooled(REAL)), statistics(pooled(FAKE))))
    assert results["inception_score"] == pytest.approx(inception_score(with_logits(FAKE).logits), rel=1e-9)


def test_fewer_images_than_dimensions_agree_to_1e_5():
    mixing = torch.randn(16, 300, generator=torch.Generator().manual_seed(1))

    def extract(images):
        return (images.float().flatten(1) @ mixing).relu()

    expected = frechet_distance(statistics(extract(REAL)), statistics(extract(FAKE)))
    assert metrics_of(extract).compute([FAKE])["frechet"] == pytest.approx(expected, rel=1e-5)


def test_an_extractor_without_logits_has_no_inception_score():
    assert set(metrics_of(pooled).compute([FAKE])) == {"frechet"}


def test_each_computation_starts_anew_from_the_same_real_images():
    metrics = metrics_of(with_logits)
    first = metrics.compute([FAKE])
    metrics.compute([FAKE[:9] // 2])
    assert metrics.compute([FAKE]) == pytest.approx(first, rel=1e-12)


def test_the_real_state_restores_the_real_images():
    first, second = metrics_of(with_logits), FeatureMetrics(with_logits, REAL[:1], CPU)
    second.real_state = first.real_state
    assert second.compute([FAKE]) == pytest.approx(first.compute([FAKE]), rel=1e-12)


def test_a_process_without_generated_images_contributes_nothing():
    halves = [metrics_of(with_logits, real) for real in (REAL[::2], REAL[1::2])]
    halves[0]._fid.update(halves[0]._features(FAKE).pooled, real=False)
    halves[1]._fid.update(halves[1]._empty.pooled, real=False)
    whole = metrics_of(with_logits)._fid
    for name, reduction in whole._reductions.items():  # as torchmetrics reduces the states of all processes
        setattr(whole, name, reduction(torch.stack([getattr(half._fid, name) for half in halves])))
    whole._update_count = 1
    whole.orig_dtype = torch.float64
    assert float(whole.compute()) == pytest.approx(frechet_distance(statistics(pooled(REAL)), statistics(pooled(FAKE))))


def test_the_global_generator_is_not_advanced():
    metrics = metrics_of(with_logits)
    before = torch.get_rng_state()
    metrics.compute([FAKE])
    assert torch.equal(torch.get_rng_state(), before)
