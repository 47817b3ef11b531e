from dataclasses import replace

import pytest

from sagl.evaluation.comparison import (
    ABSENT,
    build_report,
    cost_section,
    format_setting,
    metric_sections,
    paper_table,
    settings_section,
    shared_settings_line,
    split_settings,
)
from sagl.evaluation.metric_display import best_values, format_value
from sagl.guidance.registry import GUIDANCES
from tests.helpers.run_folders import result, run

SAG = {"sag.scale": 0.3, "sag.site": "output.5", "sag.interval": [0.5, 1.0], "seed": 0}
PAPER = {"sag.scale": 0.5, "sag.site": "output.2", "sag.threshold": 1.0, "sag.blur_sigma": 9, "sag.interval": [0, 1]}
PAPER |= {"respacing": "250", "sampler": "ddpm"}


def texts(section):
    """The texts of the cells by the name of their row."""
    return {row.name.text: [cell.text for cell in row.cells] for row in section.rows}


def best(section):
    """The texts of the cells that are marked."""
    return [cell.text for row in section.rows for cell in row.cells if cell.best]


# ------------------------------------------------------------------------------------------------ settings


def test_settings_are_split_into_different_and_equal_ones():
    runs = [run(settings=SAG), run(settings=SAG | {"sag.scale": 0.6, "sag.interval": [0.0, 1.0]})]
    assert split_settings(runs) == (["sag.scale", "sag.interval"], ["sag.site", "seed"])


def test_a_setting_that_only_one_run_has_is_different():
    runs = [run(settings={"seed": 0}), run(settings={"seed": 0, "compile": True})]
    assert split_settings(runs) == (["compile"], ["seed"])
    assert texts(settings_section(runs, ["compile"])) == {"compile": [ABSENT, "true"]}


def test_of_a_guidance_method_that_is_off_only_the_scale_is_compared():
    off = run(settings=SAG | {"sag.scale": 0.0, "sag.site": "middle"})
    assert split_settings([run(settings=SAG), off]) == (["sag.scale"], ["sag.site", "sag.interval", "seed"])
    assert split_settings([off, off]) == ([], ["seed"])
    assert "sag.site output.5" in shared_settings_line([off, run(settings=SAG)], ["sag.site"])


def test_a_run_without_the_guidance_has_off_where_a_setting_differs():
    runs = [run(settings=SAG), run(settings=SAG | {"sag.site": "middle"}), run(settings=SAG | {"sag.scale": 0.0})]
    different, shared = split_settings(runs)
    assert texts(settings_section(runs, different)) == {
        "sag.scale": ["0.3", "0.3", "0.0"],
        "sag.site": ["output.5", "middle", "off"],
    }
    assert shared_settings_line(runs, shared) == "sag.interval 0.5, 1.0 · seed 0"


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [
        (None, "kernel_size", "default"),
        (True, "compare", "true"),
        ([0.5, 1.0], "sag.interval", "0.5, 1.0"),
        ([], "channel_mult", "none"),
        ("a" * 64, "weights_sha256", "a" * 12),
        ("a" * 64, "labels", "a" * 64),
        ("two\nlines\x1b[31m\u202e", "labels", "two\\nlines\\x1b[31m\\u202e"),
    ],
)
def test_a_setting_is_formatted_as_one_printable_line(value, name, expected):
    assert format_setting(value, name) == expected


def test_a_single_run_has_a_table_of_all_its_settings():
    report = build_report([run(settings=SAG)])
    assert [section.title for section in report.tables[0].sections][-1] == "Settings"
    assert report.shared_settings == ""


# --------------------------------------------------------------------------------------------------------- cost


def test_cost_has_network_evaluations_operations_and_seconds():
    rows = texts(
        cost_section(
            [run(num_images=50, seconds=4.0, nfe=15, flops=2.5e12), run("b", num_images=1000, num_requested=2000)]
        )
    )
    assert rows["images"] == ["50", "1,000 of 2,000"]
    assert rows["image size"] == ["8×8", "8×8"]
    assert rows["network evaluations per image"] == ["15", "10"]
    assert rows["seconds of all processes"] == ["4.0", "2.0"]
    assert rows["GFLOPs per image"] == ["2,500", ABSENT]
    assert rows["seconds per image and process"] == ["0.08", "0.002"]


def test_unknown_cost_is_absent():
    rows = texts(cost_section([run(num_images=0, seconds=0.0, nfe=None, flops=None, size=None)]))
    assert [cells[0] for name, cells in rows.items() if name not in ("folder", "images")] == [ABSENT] * 5


# ------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("name", ["fid", "sfid", "fd", "kid", "kd"])
def test_the_lowest_distance_is_the_best(name):
    assert best_values(name, {0: 3.0, 1: 2.0, 3: 4.0}) == {1}


@pytest.mark.parametrize("name", ["is", "is_all", "precision", "recall"])
def test_the_highest_score_is_the_best(name):
    assert best_values(name, {0: 0.3, 1: 0.2, 3: 0.4}) == {3}


def test_values_that_are_displayed_alike_are_equal_and_none_of_equal_ones_is_best():
    assert best_values("fd", {0: 12.301, 1: 12.299, 2: 13.0}) == {0, 1}
    assert best_values("fd", {0: 12.301, 1: 12.299}) == set()
    assert best_values("fd", {0: 12.3}) == set()


def test_an_unknown_metric_has_no_best_value():
    assert best_values("charm", {0: 1.0, 1: 2.0}) == set()


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [("fid", 12.345, "12.35"), ("precision", 0.6, "0.600"), ("kd", -1e-9, "0.00000"), ("charm", 1234.5678, "1234.6")],
)
def test_values_have_the_digits_of_their_metric(name, number, expected):
    assert format_value(name, number) == expected


def test_values_of_the_same_conditions_share_a_row_with_the_best_one_marked():
    interval = {"intervals": {"fd": (12.0, 12.6)}}
    runs = [run(results=[result({"fd": 12.3, "is": 4.1}, **interval)]), run(results=[result({"fd": 14})])]
    (section,) = metric_sections(runs)
    assert (section.title, section.note) == (
        "20,000 images against test (10,000 images)",
        "features of effnet_lite0_64",
    )
    distance, score = section.rows
    assert (distance.name.text, score.name.text) == ("Fréchet distance ↓", "IS, chunks of 5,000 ↑")
    assert [(cell.text, cell.note, cell.best) for cell in distance.cells] == [
        ("12.30", "12.00 … 12.60", True),
        ("14.00", "", False),
    ]
    assert [(cell.text, cell.best) for cell in score.cells] == [("4.10", False), (ABSENT, False)]


def test_a_metric_with_resamples_has_a_row_of_paired_differences_from_the_first_run_that_has_them():
    resampled = [result({"fd": 12 + k}, resamples={"fd": (10.0 + 2 * k, 14.0)}) for k in range(2)]
    runs = [
        run(name="a", results=[result({"fd": 20})]),
        *(run(name=n, results=[r]) for n, r in zip("bc", resampled, strict=True)),
    ]
    (section,) = metric_sections(runs)
    _, difference = section.rows
    assert "b" in difference.name.text
    assert [(cell.text, cell.note) for cell in difference.cells] == [
        (ABSENT, "not paired: evaluated without `bootstrap`"),
        (ABSENT, ""),
        ("+1.00", "+0.05 … +1.95"),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"extractor": "effnet_lite0_224"},
        {"extractor_version": "a"},
        {"reference": "train"},
        {"num_samples": 500},
        {"num_reference": 500},
        {"num_reference": None},
        {"resize": "bicubic"},
        {"reference_digest": "b" * 16},
        {"reference_crop_size": 64},
        {"settings": {"image_size": 32}},
    ],
    ids=str,
)
def test_values_of_different_conditions_never_share_a_row(change):
    one, other = result({"fd": 12.3}), result({"fd": 1.0}, **change)
    sections = metric_sections([run(results=[one]), run(results=[other])])
    assert [texts(section)["Fréchet distance ↓"] for section in sections] == [["12.30", ABSENT], [ABSENT, "1.00"]]
    assert not any(map(best, sections))


def test_the_size_that_the_images_of_the_reference_were_cropped_to_is_shown():
    runs = [run(results=[result({"fd": 12.3}, reference_crop_size=size)]) for size in (32, 64)]
    notes = [section.note for section in metric_sections(runs)]
    assert ["32×32" in note for note in notes] == [True, False]
    assert ["64×64" in note for note in notes] == [False, True]


def test_runs_of_other_ids_share_a_row_without_a_paired_difference():
    resampled = {"resamples": {"fd": (10.0, 14.0)}}
    ids = ("0-19999", "20000-39999", "0-19999", "")  # the last is of a version that did not store them
    runs = [run(n, results=[result({"fd": 12.3}, ids=i, **resampled)]) for n, i in zip("abcd", ids, strict=True)]
    (section,) = metric_sections(runs)
    values, differences = section.rows
    assert [cell.text for cell in values.cells] == ["12.30"] * 4
    assert [cell.text for cell in differences.cells] == [ABSENT, ABSENT, "0.00", "0.00"]
    assert differences.cells[1].note == "not paired: ids 20000-39999"


def test_runs_that_were_resampled_otherwise_share_a_row_with_the_reason_for_no_paired_difference():
    settings = ({"bootstrap": 2, "seed": 0}, {"bootstrap": 2, "seed": 1})
    resamples = {"fd": (10.0, 14.0)}
    (section,) = metric_sections(
        [run(results=[result({"fd": 12.3}, resamples=resamples, settings=s)]) for s in settings]
    )
    assert section.rows[1].cells[1].note == "not paired: other `bootstrap` or `seed`"


def test_the_version_of_an_extractor_is_shown():
    runs = [run(results=[result({"fd": 12.3}, extractor_version=version)]) for version in ("a1\x1b", "b2")]
    notes = [section.note for section in metric_sections(runs)]
    assert notes == ["features of effnet_lite0_64, version a1\\x1b", "features of effnet_lite0_64, version b2"]


def test_several_results_of_a_run_are_matched_with_those_of_the_other():
    near, far = {"num_samples": 500}, {"num_samples": 5000}
    one = run(results=[result({"fd": 1.0}, **near), result({"fd": 2.0}, **far)])
    other = run(results=[result({"fd": 3.0}, **far), result({"fd": 4.0}, **near)])
    values = [texts(section)["Fréchet distance ↓"] for section in metric_sections([one, other])]
    assert values == [["1.00", "4.00"], ["2.00", "3.00"]]


def test_a_metric_with_different_settings_has_a_row_of_its_own():
    def evaluation(num_neighbors):
        return result({"precision": 0.6, "fd": 12.3}, settings={"num_neighbors": num_neighbors})

    (section,) = metric_sections([run(results=[evaluation(3)]), run(results=[evaluation(5)])])
    rows = [(row.name.text, row.name.note, [cell.text for cell in row.cells]) for row in section.rows]
    assert rows == [
        ("Fréchet distance ↓", "", ["12.30", "12.30"]),
        ("precision ↑", "num_neighbors 3", ["0.600", ABSENT]),
        ("precision ↑", "num_neighbors 5", [ABSENT, "0.600"]),
    ]


def test_the_later_of_two_results_of_the_same_conditions_is_shown():
    (section,) = metric_sections([run(results=[result({"fd": 1.0, "kd": 2.0}), result({"fd": 3.0})])])
    assert texts(section) == {"Fréchet distance ↓": ["3.00"], "kernel distance ↓": ["2.00000"]}


def test_runs_without_results_have_no_section():
    assert metric_sections([run(), run()]) == []


@pytest.mark.parametrize(("name", "setting"), [("recall", "max_features"), ("kd", "max_features"), ("kd", "seed")])
def test_values_of_other_settings_are_in_different_rows(name, setting):
    runs = [run(k, results=[result({name: 0.5 + n}, settings={setting: n})]) for n, k in enumerate("ab")]
    (section,) = metric_sections(runs)
    assert [row.name.note for row in section.rows] == [f"{setting} 0", f"{setting} 1"]
    assert best(section) == []


def test_notes_and_deviations_are_shown():
    first = result({"kd": 0.5}, stds={"kd": 0.25}, notes=("Too few images.",))
    (section,) = metric_sections([run("a", results=[first]), run("b", results=[replace(first, notes=())])])
    assert section.rows[0].cells[0].note == "± 0.25000"
    assert section.note.endswith(". Too few images.")


# -------------------------------------------------------------------------------------------------------- paper


def test_the_papers_row_is_shown_above_the_runs_own_inception_values():
    results = [
        result({"fd": 12.3}),
        result({"fid": 27.9, "precision": 0.612}, extractor="inception", num_samples=10_000),
    ]
    runs = [run(model="imagenet256_uncond", settings=PAPER, results=results), run("plain")]
    _, table = build_report(runs).tables
    assert "50,000 images of 250 steps" in table.note
    assert table.columns == ("images", "steps", "FID", "sFID", "IS, chunks of 5,000", "precision", "recall")
    (section,) = table.sections
    assert section.title == "a: imagenet256_uncond, sag.scale 0.5"
    assert texts(section) == {
        "paper, Table 2": ["50,000", "250", "20.31", "5.09", "45.30", "0.66", "0.61"],
        "a": ["10,000", "250 (ddpm)", "27.90", ABSENT, ABSENT, "0.61", ABSENT],
    }


def test_a_run_without_inception_values_is_shown_beside_the_paper():
    settings = PAPER | {"sag.scale": 0.0, "respacing": "ddim25", "sampler": "ddim"}
    results = [result({"fid": 1.0, "precision": 0.6})]
    (section,) = paper_table([run(model="lsun_cat", settings=settings, results=results)]).sections
    assert section.title == "a: lsun_cat, no guidance"
    assert texts(section)["a"] == ["16", "ddim25", *[ABSENT] * 5]
    assert section.rows[1].name.note == "not evaluated with inception yet"


def test_a_registered_guidance_method_is_named_and_sets_a_run_apart_from_the_paper(monkeypatch):
    monkeypatch.setitem(GUIDANCES, "new", GUIDANCES["cfg"])
    runs = [run(model="imagenet256_uncond", settings=PAPER | {"new.scale": scale, "new.k": 1}) for scale in (0, 2.0)]
    assert [summary.guidance for summary in runs] == ["sag.scale 0.5", "sag.scale 0.5, new.scale 2.0"]
    assert texts(settings_section(runs, ["new.k"])) == {"new.k": ["off", "1"]}
    assert [section.title for section in paper_table(runs).sections] == ["a: imagenet256_uncond, sag.scale 0.5"]


def test_other_runs_have_no_table_of_the_paper():
    assert paper_table([run(settings=PAPER), run(settings=PAPER, model=None)]) is None
