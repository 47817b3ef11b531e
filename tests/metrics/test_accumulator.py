import numpy as np
import pytest
import torch

from sagl.metrics.accumulator import FeatureAccumulator
from sagl.metrics.features import Features
from sagl.metrics.frechet import statistics

GENERATOR = torch.Generator().manual_seed(0)
POOLED, SPATIAL, LOGITS = (torch.randn(50, d, generator=GENERATOR) for d in (6, 4, 3))


def accumulate(max_features=50, sizes=(20, 1, 29), keep_logits=True):
    accumulator = FeatureAccumulator(total=50, max_features=max_features, keep_logits=keep_logits)
    for parts in zip(*(x.split(list(sizes)) for x in (POOLED, SPATIAL, LOGITS)), strict=True):
        accumulator.add(Features(*parts))
    return accumulator.finalize()


@pytest.mark.parametrize("sizes", [(50,), (20, 1, 29), (1,) * 50])
def test_batches_of_any_size_give_the_statistics_of_the_whole_set(sizes):
    result = accumulate(sizes=sizes)
    for part, whole in ((result.pooled, POOLED), (result.spatial, SPATIAL)):
        expected = statistics(whole)
        np.testing.assert_allclose(part.mean, expected.mean, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(part.covariance, expected.covariance, rtol=1e-12, atol=1e-14)
        assert part.num_samples == 50
    assert result.features.equal(POOLED)
    assert result.logits.equal(LOGITS)


@pytest.mark.parametrize("max_features", [1, 2, 7, 33, 49])
def test_stored_features_are_evenly_spaced_for_any_batch_size(max_features):
    features = accumulate(max_features=max_features).features
    assert features.equal(accumulate(max_features=max_features, sizes=(50,)).features)
    assert len(features) == max_features
    indices = [next(i for i in range(50) if POOLED[i].equal(row)) for row in features]
    assert indices[0] == 0
    assert set(np.diff(indices)) <= {50 // max_features, 50 // max_features + 1}


def test_logits_and_spatial_features_are_optional():
    accumulator = FeatureAccumulator(total=2, max_features=2, keep_logits=True)
    accumulator.add(Features(POOLED[:2]))
    result = accumulator.finalize()
    assert (result.spatial, result.logits) == (None, None)
    assert accumulate(keep_logits=False).logits is None
