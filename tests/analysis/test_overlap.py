from dataclasses import replace

import pytest
from PIL import Image

from sagl.analysis.overlap import analyze_overlap
from sagl.analysis.registry import run_analysis
from tests.helpers.analyses import analysis_request
from tests.helpers.errors import refused
from tests.helpers.networks import count_calls, grey_unet


@pytest.fixture
def overlap(tmp_path):
    """Analyze two samples with whole images or nothing as object masks."""

    def analyze(*values):
        for sample_id, value in enumerate(values):
            Image.new("L", (8, 8), value).save(tmp_path / f"{sample_id:06d}.png")
        return analyze_overlap(analysis_request(grey_unet(), tmp_path, object_masks=str(tmp_path)))

    return analyze


def test_the_overlap_with_the_whole_image_is_the_area_of_the_mask_as_by_chance(overlap):
    numbers = overlap(255, 255)
    (values,) = numbers["iou"].values()
    assert numbers["num_with_object"] == 2
    assert 0 < values["attention"] == values["random"] < 1
    assert values["difference"] == {"estimate": 0, "low": 0, "high": 0}


def test_samples_without_an_object_are_left_out(overlap):
    assert overlap(0, 255)["num_with_object"] == 1
    assert overlap(0, 0)["iou"] == {}


@pytest.mark.parametrize("source", ["absent", ""])
def test_object_masks_that_do_not_exist_are_refused_before_anything_is_sampled(source, tmp_path):
    request = analysis_request(grey_unet(), tmp_path, object_masks=source)
    with refused("`object_masks`", source):
        run_analysis("overlap", request, {})
    calls = count_calls(request.pipeline.network)
    (tmp_path / "masks").mkdir()
    with refused("`object_masks`", "000000.png"):
        analyze_overlap(replace(request, object_masks=str(tmp_path / "masks")))
    assert calls == []
