import pytest

from sagl.configuration.sample import sampling_settings
from sagl.evaluation.paper import matching_rows, paper_rows
from sagl.models.zoo import RELEASED
from sagl.utils.config_files import read_config

UNCOND = {"sag.scale": 0.5, "sag.site": "output.2", "sag.threshold": 1.0, "sag.blur_sigma": 9.0, "sag.kernel_size": 31}
UNCOND |= {"sag.interval": [0.0, 1.0], "cfg.scale": 0.0, "classifier.scale": 0.0, "respacing": "25"}
IMAGENET128 = UNCOND | {"sag.scale": 0.1, "sag.site": "output.8", "sag.blur_sigma": 3.0}


def rows_of(model, settings):
    return [(row.table, row.values) for row in matching_rows(model, settings)]


def test_a_run_has_the_row_of_its_network_and_scale():
    expected = {"fid": 20.31, "sfid": 5.09, "is": 45.30, "precision": 0.66, "recall": 0.61}
    assert rows_of("imagenet256_uncond", UNCOND) == [("Table 2", expected)]
    assert matching_rows("imagenet256_uncond", UNCOND)[0].images == 50_000
    assert matching_rows("imagenet256_uncond", UNCOND)[0].steps == 250


def test_a_run_of_imagenet128_is_in_several_tables():
    rows = matching_rows("imagenet128", IMAGENET128)
    assert [(row.table, row.images, row.values["fid"]) for row in rows] == [
        ("Table 3", 50_000, 5.11),
        ("Tables 4, 5, 6, 9", 10_000, 5.47),
    ]


@pytest.mark.parametrize(
    ("setting", "value", "table", "fid"),
    [
        ("sag.threshold", 0.7, "Table 5", 5.67),
        ("sag.threshold", 1.3, "Table 5", 5.66),
        ("sag.site", "output.2", "Table 6", 5.59),
        ("sag.site", "output.5", "Table 6", 5.57),
        ("sag.site", "input.8", "Table 8", 5.61),
        ("sag.site", "input.11", "Table 8", 5.54),
        ("sag.site", "middle", "Table 8", 5.63),
        ("sag.blur_sigma", 1.0, "Table 9", 5.58),
        ("sag.blur_sigma", 9.0, "Table 9", 5.70),
    ],
)
def test_each_ablation_has_a_row(setting, value, table, fid):
    rows = matching_rows("imagenet128", IMAGENET128 | {setting: value})
    assert [(row.table, row.values["fid"]) for row in rows] == [(table, fid)]


@pytest.mark.parametrize(("mask", "fid"), [("global", 5.82), ("random", 5.68), ("square", 5.68), ("dino", 5.63)])
def test_each_mask_of_table_4_has_a_row(mask, fid):
    area = None if mask == "global" else 0.4
    rows = matching_rows("imagenet128", IMAGENET128 | {"sag.mask": mask, "sag.area_fraction": area})
    assert [(row.table, row.values["fid"]) for row in rows] == [("Table 4", fid)]


def test_classifier_guidance_is_compared():
    both = IMAGENET128 | {"classifier.scale": 0.5}
    assert [values["fid"] for _, values in rows_of("imagenet128", both)] == [2.58]
    assert [values["fid"] for _, values in rows_of("imagenet128", both | {"sag.scale": 0.0})] == [2.97]
    assert rows_of("imagenet128", both | {"classifier.scale": 1.0}) == []


def test_other_settings_of_a_guidance_that_is_off_are_ignored():
    plain = UNCOND | {"sag.scale": 0.0, "sag.site": "middle", "sag.interval": [0.5, 1.0]}
    assert [values["fid"] for _, values in rows_of("imagenet256_uncond", plain)] == [26.21]


@pytest.mark.parametrize(
    "change",
    [
        {"sag.scale": 0.3},
        {"sag.site": "output.5"},
        {"sag.threshold": 1.3},
        {"sag.blur_sigma": 3.0},
        {"sag.kernel_size": 15},
        {"sag.soft": True},
        {"sag.interval": [0.5, 1.0]},
        {"sag.interval": None},
        {"cfg.scale": 1.0},
        {"classifier.scale": 1.0},
    ],
    ids=str,
)
def test_a_run_with_another_guidance_has_no_row(change):
    assert rows_of("imagenet256_uncond", UNCOND | change) == []


@pytest.mark.parametrize("model", [None, "fashion_mnist", "imagenet512"])
def test_another_network_has_no_row(model):
    assert rows_of(model, UNCOND) == []


def test_the_default_kernel_is_the_papers_own():
    assert rows_of("imagenet256_uncond", UNCOND | {"sag.kernel_size": None}) == rows_of("imagenet256_uncond", UNCOND)


def test_the_number_of_steps_may_differ():
    assert rows_of("imagenet256_uncond", UNCOND | {"respacing": "ddim25"}) == rows_of("imagenet256_uncond", UNCOND)


@pytest.mark.parametrize("model", sorted({row.model for row in paper_rows()}))
def test_the_packaged_config_of_a_network_in_the_paper_has_a_row(model):
    recommended = sampling_settings(read_config(RELEASED[model].config))
    settings = {f"sag.{name}": value for name, value in recommended["sag"].items()} | {"sag.interval": [0.0, 1.0]}
    settings["classifier.scale"] = recommended.get("classifier", {}).get("scale", 0.0)
    assert rows_of(model, settings) != []


def test_there_are_as_many_rows_as_the_paper_prints():
    """Table 2: 9; table 3: 4; in the ablations a baseline, the best of them, and 13 others."""
    assert len(paper_rows()) == 9 + 4 + 15


def test_no_two_rows_of_a_table_are_equal():
    rows = paper_rows()
    assert {name for row in rows for name in row.values} == {"fid", "sfid", "is", "precision", "recall"}
    assert len({(row.table, row.model, str(row.guidances)) for row in rows}) == len(rows)
