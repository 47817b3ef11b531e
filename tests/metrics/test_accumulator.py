import numpy as np
import pytest
import torch

from sagl.metrics.accumulator import FeatureAccumulator
from sagl.metrics.features import Features
from sagl.metrics.frechet import CovarianceAccumulator, statistics

GENERATOR = torch.Generator().manual_seed(0)
POOLED, SPATIAL, LOGITS = (torch.randn(50, d, generator=GENERATOR) for d in (6, 4, 3))


def tallied(num_kept=50, sizes=(20, 1, 29), keep_logits=True):
    tally = FeatureAccumulator(total=50, num_kept=num_kept, keep_logits=keep_logits)
    for parts in zip(*(x.split(list(sizes)) for x in (POOLED, SPATIAL, LOGITS)), strict=True):
        tally.add(Features(*parts))
    return tally.done()


@pytest.mark.parametrize("sizes", [(50,), (20, 1, 29), (1,) * 50])
def test_sums_of_parts_are_the_statistics_of_the_whole(sizes):
    found = tallied(sizes=sizes)
    for part, whole in ((found.pooled, POOLED), (found.spatial, SPATIAL)):
        want = statistics(whole)
        np.testing.assert_allclose(part.mean, want.mean, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(part.covariance, want.covariance, rtol=1e-12, atol=1e-14)
        assert part.num_samples == 50
    assert found.features.equal(POOLED)
    assert found.logits.equal(LOGITS)


def test_a_large_mean_costs_no_digits():
    sums, far = CovarianceAccumulator(), POOLED.double() + 1e7
    for part in far.split(7):
        sums.add(part)
    np.testing.assert_allclose(sums.statistics().covariance, statistics(far).covariance, rtol=1e-8)


@pytest.mark.parametrize("num_kept", [1, 2, 7, 33, 49])
def test_kept_features_are_evenly_spaced_however_they_come(num_kept):
    found = tallied(num_kept=num_kept).features
    assert found.equal(tallied(num_kept=num_kept, sizes=(50,)).features)
    assert len(found) == num_kept
    places = [next(i for i in range(50) if POOLED[i].equal(row)) for row in found]
    assert places[0] == 0
    assert set(np.diff(places)) <= {50 // num_kept, 50 // num_kept + 1}


def test_logits_and_spatial_features_may_be_missing():
    tally = FeatureAccumulator(total=2, num_kept=2, keep_logits=True)
    tally.add(Features(POOLED[:2]))
    found = tally.done()
    assert (found.spatial, found.logits) == (None, None)
    assert tallied(keep_logits=False).logits is None
