import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sagl.errors import UserError
from sagl.evaluation.results import RESULTS_FILE, EvaluationResult, read_results, save_result
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.bootstrap import paired_difference, resample
from sagl.metrics.compute import compute_metrics
from sagl.metrics.frechet import FrechetReference, statistics
from sagl.settings.evaluation import MetricSettings
from tests.helpers.run_folders import json_result

REPRODUCTION = Path(__file__).parents[2] / "docs" / "reproduction"


def write(folder, *entries):
    (folder / RESULTS_FILE).write_text(json.dumps({"results": entries}))


def test_a_run_without_a_file_has_no_results(tmp_path):
    assert read_results(tmp_path) == ()


def test_results_are_read_in_the_order_of_the_file(tmp_path):
    write(
        tmp_path,
        json_result({"fd": 12.3, "is": 4}, intervals={"fd": [12, 12.6]}),
        json_result({}, extractor="inception"),
    )
    first, second = read_results(tmp_path)
    assert first == EvaluationResult(
        extractor="effnet_lite0_64",
        reference="fashion_mnist_test",
        num_samples=20000,
        num_reference=10000,
        resize="bilinear to 64×64",
        values={"fd": 12.3, "is": 4.0},
        intervals={"fd": (12.0, 12.6)},
        settings={"num_neighbors": 3, "is_chunk": 5000, "kid_subsets": 100, "kid_subset_size": 1000},
        images="x",
        seconds=12.1,
    )
    assert (second.extractor, second.values) == ("inception", {})


@pytest.mark.parametrize("missing", ["num_reference", "resize", "intervals", "settings", "seconds", "images"])
def test_optional_fields_may_be_missing(missing, tmp_path):
    entry = json_result({"fd": 12.3})
    del entry[missing]
    write(tmp_path, entry)
    assert read_results(tmp_path)[0].values == {"fd": 12.3}


@pytest.mark.parametrize(
    "change",
    [
        {"extractor": 3},
        {"reference": None},
        {"num_samples": "many"},
        {"num_reference": "all"},
        {"values": [12.3]},
        {"values": {"fd": "12.3"}},
        {"values": {"fd": float("nan")}},
        {"values": {"fd": 10**400}},
        {"intervals": {"fd": 12.0}},
        {"intervals": {"fd": [12.0]}},
        {"resamples": {"fd": 12.0}},
        {"resamples": {"fd": ["12.0"]}},
        {"settings": ["num_neighbors"]},
    ],
    ids=str,
)
def test_an_entry_of_the_wrong_type_is_refused(change, tmp_path):
    write(tmp_path, json_result({"fd": 12.3}) | change)
    with pytest.raises(UserError, match=r"`run` .*evaluation\.json"):
        read_results(tmp_path)


@pytest.mark.parametrize("text", [b"", b"[]", b'{"results": 3}', b'{"results": [3]}', b"\xff"])
def test_a_file_without_a_list_of_results_is_refused(text, tmp_path):
    (tmp_path / RESULTS_FILE).write_bytes(text)
    with pytest.raises(UserError, match=r"`run` .*evaluation\.json"):
        read_results(tmp_path)


def test_a_saved_result_replaces_the_same_measurement(tmp_path):
    common = {"extractor": "tiny", "reference": "r", "num_samples": 9, "images": "run", "notes": ("few",)}
    first = EvaluationResult(**common, values={"fd": 1.0, "kd": 0.1}, stds={"kd": 0.01}, intervals={"fd": (0.5, 2.0)})
    other = replace(first, settings={"seed": 1})
    for result in (first, other, replace(first, values={"fd": 3.0})):
        save_result(tmp_path, result)
    assert read_results(tmp_path) == (other, replace(first, values={"fd": 3.0}))


def test_a_result_of_a_version_without_the_size_of_the_reference_is_replaced_by_the_same_measurement(tmp_path):
    write(tmp_path, json_result({"fd": 12.3}))
    (earlier,) = read_results(tmp_path)
    assert earlier.reference_crop_size is None
    save_result(tmp_path, later := replace(earlier, reference_crop_size=64))
    assert read_results(tmp_path) == (later,)


def test_a_result_of_another_version_of_the_extractor_is_added(tmp_path):
    first = EvaluationResult(extractor="tiny", reference="r", num_samples=9, values={"fd": 1.0}, extractor_version="a")
    for result in (first, second := replace(first, extractor_version="b"), first):
        save_result(tmp_path, result)
    assert read_results(tmp_path) == (second, first)


@pytest.mark.parametrize("path", sorted(REPRODUCTION.glob("*/runs/*/evaluation.json"))[:2], ids=str)
def test_results_of_versions_without_ids_and_version_of_the_extractor_are_read_and_have_differences(path):
    (result, *_) = read_results(path.parent)
    assert (result.ids, result.extractor_version) == ("", "")
    assert result.difference(result, "fd") == (0.0, 0.0, 0.0)
    assert result.difference(replace(result, ids="0-299"), "fd") is not None


def test_results_whose_values_were_changed_are_refused(tmp_path):
    save_result(tmp_path, EvaluationResult(extractor="tiny", reference="r", num_samples=9, values={"fd": 12.5}))
    path = tmp_path / RESULTS_FILE
    path.write_text(path.read_text().replace("12.5", "11.5"))
    with pytest.raises(UserError, match=r"`run` .*evaluation\.json"):
        read_results(tmp_path)


def test_the_difference_of_two_results_is_that_of_their_features_resampled_in_pairs():
    generator = torch.Generator().manual_seed(0)
    real, first, second = (scale * torch.randn(40, 3, generator=generator) for scale in (1, 0.8, 0.7))
    reference, settings = FeatureStatistics(pooled=statistics(real)), MetricSettings(bootstrap=30, seed=2)
    results = [
        EvaluationResult(
            extractor="tiny",
            reference="r",
            num_samples=40,
            values=(metrics := compute_metrics(sample_statistics(features), reference, settings)).values,
            resamples=metrics.resamples,
            settings={"bootstrap": 30, "seed": 2},
        )
        for features in (first, second)
    ]
    frechet = FrechetReference(statistics(real))

    def distance(features):
        return frechet(statistics(features))

    resamples = [resample(features, distance, num_resamples=30, seed=2) for features in (first, second)]
    expected = paired_difference(distance(second) - distance(first), *resamples)
    assert results[1].difference(results[0], "fd") == pytest.approx(expected, rel=1e-5)


def sample_statistics(features):
    return FeatureStatistics(pooled=statistics(features), features=features)


@pytest.mark.parametrize(
    "change",
    [
        {"ids": "0-7, 9-9"},
        {"num_samples": 8},
        {"settings": {"bootstrap": 2, "seed": 1}},
        {"settings": {"bootstrap": 2, "seed": 0, "image_size": 64}},
        {"resamples": {}},
        {"extractor": "other"},
        {"extractor_version": "other"},
        {"reference": "other"},
        {"reference_digest": "other"},
        {"reference_crop_size": 64},
        {"num_reference": 3},
        {"resize": "other"},
    ],
    ids=str,
)
def test_results_of_other_conditions_or_resamples_have_no_difference(change):
    common = {"extractor": "tiny", "reference": "r", "num_samples": 9, "settings": {"bootstrap": 2, "seed": 0}}
    first = EvaluationResult(**common, ids="0-8", values={"fd": 1.0}, resamples={"fd": (0.5, 2.0)})
    assert first.difference(first, "fd") == (0.0, 0.0, 0.0)
    assert replace(first, **change).difference(first, "fd") is None
    assert first.difference(replace(first, **change), "fd") is None
