from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from sagl.errors import UserError
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.bootstrap import resampled_rows
from sagl.metrics.compute import compute_metrics
from sagl.metrics.frechet import frechet_distance, statistics
from sagl.metrics.inception_score import inception_score, inception_score_in_chunks
from sagl.metrics.kid import kernel_distance
from sagl.metrics.precision_recall import precision_recall
from sagl.settings.evaluation import MetricSettings

GENERATOR = torch.Generator().manual_seed(0)
REAL, REAL_SPATIAL = torch.randn(80, 6, generator=GENERATOR), torch.randn(80, 9, generator=GENERATOR)
FAKE, FAKE_SPATIAL = 0.8 * torch.randn(60, 6, generator=GENERATOR) + 0.3, torch.randn(60, 9, generator=GENERATOR)
LOGITS = torch.randn(60, 5, generator=GENERATOR)
SETTINGS = MetricSettings(kid_subsets=7, kid_subset_size=40)


def fake(features=FAKE, **changes):
    whole = {"pooled": statistics(features), "spatial": statistics(FAKE_SPATIAL), "features": features}
    return FeatureStatistics(**whole | {"logits": LOGITS} | changes)


def real(features=REAL, **changes):
    whole = {"pooled": statistics(features), "spatial": statistics(REAL_SPATIAL), "features": features}
    return FeatureStatistics(**whole | changes)


def test_all_metrics_have_the_names_of_the_literature():
    results = compute_metrics(fake(), real(), SETTINGS, inception=True)
    kernel = kernel_distance(FAKE, REAL, num_subsets=7, subset_size=40)
    precision, recall = precision_recall(FAKE, REAL)
    assert results.values == {
        "fid": pytest.approx(frechet_distance(statistics(FAKE), statistics(REAL)), rel=1e-12),
        "sfid": pytest.approx(frechet_distance(statistics(FAKE_SPATIAL), statistics(REAL_SPATIAL)), rel=1e-12),
        "is": inception_score_in_chunks(LOGITS),
        "is_all": inception_score(LOGITS),
        "precision": precision,
        "recall": recall,
        "kid": kernel.mean,
    }
    assert results.stds == {"kid": kernel.std}
    assert results.intervals == {}
    others = compute_metrics(fake(), real(), SETTINGS).values
    assert set(others) == {"fd", "sfd", "is", "is_all", "precision", "recall", "kd"}  # of other features


def test_metrics_without_data_are_left_out():
    results = compute_metrics(fake(), replace(real(), spatial=None, features=None), SETTINGS, inception=True).values
    assert set(results) == {"fid", "is", "is_all"}
    results = compute_metrics(fake(logits=None, spatial=None), real(), SETTINGS).values
    assert set(results) == {"fd", "precision", "recall", "kd"}


def test_the_distance_has_an_interval_on_request():
    settings = MetricSettings(kid_subsets=1, kid_subset_size=10, bootstrap=50)
    results = compute_metrics(fake(), real(), settings)
    low, high = results.intervals["fd"]
    assert low < results.values["fd"] < high
    assert compute_metrics(fake(), real(), settings).intervals == results.intervals
    rows = resampled_rows(len(FAKE), 50, settings.seed)
    expected = [frechet_distance(statistics(FAKE[row]), statistics(REAL)) for row in rows]
    assert results.resamples["fd"] == pytest.approx(expected, rel=1e-6)


class Identity(torch.nn.Module):
    num_features = 6

    def forward(self, x):
        return x


def test_torchmetrics_has_the_same_fid():
    public = FrechetInceptionDistance(feature=Identity(), normalize=True, input_img_size=(6,)).set_dtype(torch.float64)
    public.inception.num_features = 6
    for features, is_real in ((REAL, True), (FAKE, False)):
        public.update(features.double(), real=is_real)
    assert compute_metrics(fake(), real(), SETTINGS).values["fd"] == pytest.approx(float(public.compute()), rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["images", "reference"])
def test_features_that_are_not_finite_are_refused(bad, side):
    features = (FAKE if side == "images" else REAL).clone()
    features[17, 3] = bad
    sets = (fake(features), real()) if side == "images" else (fake(), real(features))
    with pytest.raises(UserError, match=rf"`{side}` .*finite"):
        compute_metrics(*sets, SETTINGS)
    logits = LOGITS.clone()
    logits[3, 1] = bad
    if bad != -np.inf:  # a class of probability 0
        with pytest.raises(UserError, match=r"`extractor` .* nan"):
            compute_metrics(fake(logits=logits), real(), SETTINGS)


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(UserError, match=r"`reference` .* 6 .* 5"):
        compute_metrics(fake(), real(REAL[:, :5]), SETTINGS)
    with pytest.raises(UserError, match=r"`num_neighbors` .* 3, got 3"):
        compute_metrics(fake(FAKE[:3]), real(), SETTINGS)
