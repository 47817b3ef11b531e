from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from sagl.errors import UserError
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.compute import compute_metrics
from sagl.metrics.frechet import frechet_distance, statistics
from sagl.metrics.inception_score import inception_score, inception_score_in_chunks
from sagl.metrics.kid import kernel_distance
from sagl.metrics.precision_recall import precision_recall
from sagl.settings.evaluation import MetricSettings

GENERATOR = torch.Generator().manual_seed(0)
REAL, REAL_SPATIAL = torch.randn(80, 6, generator=GENERATOR), torch.randn(80, 9, generator=GENERATOR)
MADE, MADE_SPATIAL = 0.8 * torch.randn(60, 6, generator=GENERATOR) + 0.3, torch.randn(60, 9, generator=GENERATOR)
LOGITS = torch.randn(60, 5, generator=GENERATOR)
SETTINGS = MetricSettings(kid_subsets=7, kid_subset_size=40)


def made(features=MADE, **changes):
    whole = {"pooled": statistics(features), "spatial": statistics(MADE_SPATIAL), "features": features}
    return FeatureStatistics(**whole | {"logits": LOGITS} | changes)


def real(features=REAL, **changes):
    whole = {"pooled": statistics(features), "spatial": statistics(REAL_SPATIAL), "features": features}
    return FeatureStatistics(**whole | changes)


def test_all_numbers_under_the_names_of_the_literature():
    found = compute_metrics(made(), real(), SETTINGS, inception=True)
    shares, kernel = precision_recall(MADE, REAL), kernel_distance(MADE, REAL, subsets=7, size=40)
    assert found.values == {
        "fid": pytest.approx(frechet_distance(statistics(MADE), statistics(REAL)), rel=1e-12),
        "sfid": pytest.approx(frechet_distance(statistics(MADE_SPATIAL), statistics(REAL_SPATIAL)), rel=1e-12),
        "is": inception_score_in_chunks(LOGITS),
        "is_all": inception_score(LOGITS),
        "precision": shares.precision,
        "recall": shares.recall,
        "kid": kernel.mean,
    }
    assert found.deviations == {"kid": kernel.deviation}
    assert found.intervals == {}


def test_only_inception_s_features_have_a_fid():
    found = compute_metrics(made(), real(), SETTINGS).values
    assert set(found) == {"fd", "sfd", "is", "is_all", "precision", "recall", "kd"}


def test_what_the_reference_does_not_hold_is_left_out():
    found = compute_metrics(made(), replace(real(), spatial=None, features=None), SETTINGS, inception=True).values
    assert set(found) == {"fid", "is", "is_all"}
    assert set(compute_metrics(made(logits=None, spatial=None), real(), SETTINGS).values) == {
        "fd",
        "precision",
        "recall",
        "kd",
    }


def test_the_distance_has_an_interval_where_one_is_asked_for():
    settings = MetricSettings(kid_subsets=1, kid_subset_size=10, bootstrap=50)
    found = compute_metrics(made(), real(), settings)
    low, high = found.intervals["fd"]
    assert low < found.values["fd"] < high
    assert compute_metrics(made(), real(), settings).intervals == found.intervals


class Passed(torch.nn.Module):
    num_features = 6

    def forward(self, x):
        return x


def test_torchmetrics_has_the_same_fid_of_the_same_features():
    theirs = FrechetInceptionDistance(feature=Passed(), normalize=True, input_img_size=(6,)).set_dtype(torch.float64)
    theirs.inception.num_features = 6
    for features, is_real in ((REAL, True), (MADE, False)):
        theirs.update(features.double(), real=is_real)
    assert compute_metrics(made(), real(), SETTINGS).values["fd"] == pytest.approx(float(theirs.compute()), rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["run", "reference"])
def test_features_that_are_not_finite_are_refused(bad, side):
    features = (MADE if side == "run" else REAL).clone()
    features[17, 3] = bad
    sets = (made(features), real()) if side == "run" else (made(), real(features))
    with pytest.raises(UserError, match=rf"`{side}` must give finite features"):
        compute_metrics(*sets, SETTINGS)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_make_no_number_are_refused(bad):
    logits = LOGITS.clone()
    logits[3, 1] = bad
    with pytest.raises(UserError, match=r"`extractor` must give .* is comes out as nan"):
        compute_metrics(made(logits=logits), real(), SETTINGS)


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(UserError, match="as wide as the run's, 6 numbers, and has 5"):
        compute_metrics(made(), real(REAL[:, :5]), SETTINGS)
    with pytest.raises(UserError, match=r"`neighbours` must be below .* run has 3 .* got 3"):
        compute_metrics(made(MADE[:3]), real(), SETTINGS)
