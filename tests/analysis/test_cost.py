from dataclasses import replace
from types import SimpleNamespace

import pytest

from sagl.analysis import cost, guided_images
from sagl.analysis.cost import analyze_cost
from sagl.settings.sampling import RunSettings
from tests.helpers.analyses import analysis_request
from tests.helpers.errors import refused
from tests.helpers.networks import grey_unet, write_grey_classifier


@pytest.mark.parametrize("has_classifier", [False, True])
def test_the_cost_is_that_of_every_combination_with_the_classifier(has_classifier, tmp_path):
    classifier = str(write_grey_classifier(tmp_path / "c.safetensors")) if has_classifier else None
    numbers = analyze_cost(analysis_request(grey_unet(), tmp_path, classifier=classifier))
    guided = {"classifier": 2, "SAG + classifier": 4} if has_classifier else {}
    assert {name: row["evaluations"] for name, row in numbers.items()} == {"unguided": 2, "SAG": 4, **guided}
    assert all(row["seconds_per_image"] >= 0 for row in numbers.values())
    assert all(row["gigabytes"] > 0 for row in numbers.values())
    if has_classifier:  # whose gradients keep the features of all its layers
        assert numbers["classifier"]["gigabytes"] > numbers["unguided"]["gigabytes"]


@pytest.mark.parametrize(("labels", "network"), [("null", {}), ("random", {"num_classes": None, "null_label": False})])
def test_a_classifier_is_left_out_where_there_are_no_labels(labels, network, tmp_path):
    classifier = str(write_grey_classifier(tmp_path / "c.safetensors"))
    request = analysis_request(grey_unet(**network), tmp_path, classifier=classifier)
    numbers = analyze_cost(replace(request, samples=replace(request.samples, labels=labels)))
    assert list(numbers) == ["unguided", "SAG"]


def test_a_classifier_that_does_not_fit_is_refused_before_the_first_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(guided_images, "sample_batch", lambda *_: pytest.fail("measured"))
    classifier = str(write_grey_classifier(tmp_path / "c.safetensors", num_classes=4))
    with refused("`classifier.checkpoint`", 4):
        analyze_cost(analysis_request(grey_unet(), tmp_path, classifier=classifier))


def test_the_seconds_are_those_of_sampling_by_a_warm_pipeline_divided_by_the_images_of_whole_batches(
    tmp_path, monkeypatch
):
    """On a clock on which building takes 100 s, an image 1 s, and the first batch of a pipeline 50 s more."""
    now, pipelines = 0.0, []
    build, sample = guided_images.build_pipeline, guided_images.sample_batch

    def slow_build(*args, **kwargs):
        nonlocal now
        now += 100
        return build(*args, **kwargs)

    def slow_sample(pipeline, samples, ids, track_steps):
        nonlocal now
        now += len(ids)
        if not any(pipeline is other for other in pipelines):
            now += 50
            pipelines.append(pipeline)
        return sample(pipeline, samples, ids, track_steps)

    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(guided_images, "build_pipeline", slow_build)
    monkeypatch.setattr(guided_images, "sample_batch", slow_sample)
    classifier = str(write_grey_classifier(tmp_path / "c.safetensors"))
    request = analysis_request(grey_unet(), tmp_path, classifier=classifier)
    numbers = analyze_cost(replace(request, samples=RunSettings(num_samples=6, first_id=1, batch_size=4)))
    assert len(numbers) == 4
    assert {(row["seconds_per_image"], row["ratio"]) for row in numbers.values()} == {(1.0, 1.0)}
