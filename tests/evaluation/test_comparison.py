from dataclasses import replace

import pytest

from sagl.evaluation.comparison import (
    ABSENT,
    alike_line,
    best_of,
    cost_section,
    number_sections,
    paper_table,
    said,
    settings_section,
    shown,
    split_settings,
)
from tests.helpers.sampled import measured, run

SAG = {"sag.scale": 0.3, "sag.site": "output.5", "sag.interval": [0.5, 1.0], "seed": 0}
PAPER = {"sag.scale": 0.5, "sag.site": "output.2", "sag.threshold": 1.0, "sag.blur_sigma": 9, "sag.interval": [0, 1]}
PAPER |= {"respacing": "250", "sampler": "ddpm"}


def texts(section):
    """name -> what stands in its cells."""
    return {row.name.text: [cell.text for cell in row.cells] for row in section.rows}


# ----------------------------------------------------------------------------------------------------- settings


def test_settings_are_parted_into_those_that_differ_and_those_that_do_not():
    runs = [run(settings=SAG), run(settings=SAG | {"sag.scale": 0.6, "sag.interval": [0.0, 1.0]})]
    assert split_settings(runs) == (["sag.scale", "sag.interval"], ["sag.site", "seed"])


def test_a_setting_that_one_run_alone_has_differs():
    runs = [run(settings={"seed": 0}), run(settings={"seed": 0, "compile": True})]
    assert split_settings(runs) == (["compile"], ["seed"])
    assert texts(settings_section(runs, ["compile"])) == {"compile": [ABSENT, "true"]}


def test_of_a_guidance_that_is_off_nothing_but_its_scale_counts():
    off = run(settings=SAG | {"sag.scale": 0.0, "sag.site": "middle"})
    assert split_settings([run(settings=SAG), off]) == (["sag.scale"], ["sag.site", "sag.interval", "seed"])
    assert split_settings([off, off]) == ([], ["sag.scale", "seed"])


def test_where_a_setting_differs_a_run_without_that_guidance_says_off():
    runs = [run(settings=SAG), run(settings=SAG | {"sag.site": "middle"}), run(settings=SAG | {"sag.scale": 0.0})]
    differ, alike = split_settings(runs)
    assert texts(settings_section(runs, differ)) == {
        "sag.scale": ["0.3", "0.3", "0.0"],
        "sag.site": ["output.5", "middle", "off"],
    }
    assert alike_line(runs, alike) == "sag.interval 0.5, 1.0 · seed 0"


def test_the_line_of_what_is_alike_takes_a_guidances_settings_from_a_run_that_has_it():
    runs = [run(settings=SAG | {"sag.scale": 0.0, "sag.site": "middle"}), run(settings=SAG)]
    assert "sag.site output.5" in alike_line(runs, split_settings(runs)[1])


@pytest.mark.parametrize(
    ("value", "name", "want"),
    [
        (None, "kernel_size", "default"),
        (True, "compare", "true"),
        ([0.5, 1.0], "sag.interval", "0.5, 1.0"),
        ([], "channel_mult", "none"),
        ("a" * 64, "weights_sha256", "a" * 12),
        ("a" * 64, "labels", "a" * 64),
        ("two\nlines\x1b[31m\u202e", "labels", "two\\nlines\\x1b[31m\\u202e"),
        ("\udcff", "labels", "\\udcff"),
    ],
)
def test_values_are_said_in_one_printable_line(value, name, want):
    assert said(value, name) == want


# --------------------------------------------------------------------------------------------------------- cost


def test_cost_is_seconds_images_a_second_and_evaluations():
    found = texts(cost_section([run(num_images=50, seconds=4.0, nfe=15), run("b", num_images=1000, num_asked=2000)]))
    assert found["images"] == ["50", "1,000 of 2,000"]
    assert found["pixels of an image"] == ["8×8", "8×8"]
    assert found["network evaluations an image"] == ["15", "10"]
    assert found["seconds of all processes"] == ["4.0", "2.0"]
    assert found["images a second a process"] == ["12.5", "500"]


def test_a_run_whose_cost_is_not_known_has_none():
    found = texts(cost_section([run(num_images=0, seconds=0.0, nfe=None, size=None)]))
    assert [cells[0] for name, cells in found.items() if name not in ("folder", "images")] == [ABSENT] * 4


# ------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("name", ["fid", "sfid", "fd", "kid", "kd"])
def test_the_lower_distance_is_the_best(name):
    assert best_of(name, {0: 3.0, 1: 2.0, 3: 4.0}) == {1}


@pytest.mark.parametrize("name", ["is", "is_all", "precision", "recall"])
def test_the_higher_score_is_the_best(name):
    assert best_of(name, {0: 0.3, 1: 0.2, 3: 0.4}) == {3}


def test_numbers_that_look_alike_are_equally_good_and_where_all_do_none_is_best():
    assert best_of("fd", {0: 12.301, 1: 12.299, 2: 13.0}) == {0, 1}
    assert best_of("fd", {0: 12.301, 1: 12.299}) == set()
    assert best_of("fd", {0: 12.3}) == set()


def test_of_a_metric_that_nobody_knows_none_is_best():
    assert best_of("charm", {0: 1.0, 1: 2.0}) == set()


@pytest.mark.parametrize(
    ("name", "number", "want"),
    [("fid", 12.345, "12.35"), ("precision", 0.6, "0.600"), ("kd", -1e-9, "0.00000"), ("charm", 1234.5678, "1234.6")],
)
def test_numbers_have_the_digits_of_their_metric(name, number, want):
    assert shown(name, number) == want


def test_numbers_of_one_measurement_stand_side_by_side_with_the_best_one_marked():
    interval = {"intervals": {"fd": (12.0, 12.6)}}
    runs = [run(evaluations=[measured({"fd": 12.3, "is": 4.1}, **interval)]), run(evaluations=[measured({"fd": 14})])]
    (section,) = number_sections(runs)
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


@pytest.mark.parametrize(
    "change",
    [
        {"extractor": "effnet_lite0_224"},
        {"reference": "train"},
        {"num_samples": 500},
        {"num_reference": 500},
        {"num_reference": None},
        {"resize": "bicubic"},
    ],
    ids=str,
)
def test_numbers_of_other_measurements_are_never_in_one_row(change):
    one, other = measured({"fd": 12.3}), measured({"fd": 1.0}, **change)
    sections = number_sections([run(evaluations=[one]), run(evaluations=[other])])
    assert [texts(section)["Fréchet distance ↓"] for section in sections] == [["12.30", ABSENT], [ABSENT, "1.00"]]
    assert not any(cell.best for section in sections for row in section.rows for cell in row.cells)


def test_several_measurements_of_a_run_meet_their_own_kind_in_the_other():
    near, far = {"num_samples": 500}, {"num_samples": 5000}
    one = run(evaluations=[measured({"fd": 1.0}, **near), measured({"fd": 2.0}, **far)])
    other = run(evaluations=[measured({"fd": 3.0}, **far), measured({"fd": 4.0}, **near)])
    found = [texts(section)["Fréchet distance ↓"] for section in number_sections([one, other])]
    assert found == [["1.00", "4.00"], ["2.00", "3.00"]]


def test_a_metric_taken_with_other_settings_has_a_row_of_its_own():
    def evaluation(num_neighbors):
        return measured({"precision": 0.6, "fd": 12.3}, settings={"num_neighbors": num_neighbors})

    (section,) = number_sections([run(evaluations=[evaluation(3)]), run(evaluations=[evaluation(5)])])
    found = [(row.name.text, row.name.note, [cell.text for cell in row.cells]) for row in section.rows]
    assert found == [
        ("Fréchet distance ↓", "", ["12.30", "12.30"]),
        ("precision ↑", "num_neighbors 3", ["0.600", ABSENT]),
        ("precision ↑", "num_neighbors 5", [ABSENT, "0.600"]),
    ]


def test_the_later_of_two_alike_measurements_holds():
    (section,) = number_sections([run(evaluations=[measured({"fd": 1.0, "kd": 2.0}), measured({"fd": 3.0})])])
    assert texts(section) == {"Fréchet distance ↓": ["3.00"], "kernel distance ↓": ["2.00000"]}


def test_runs_that_were_not_measured_have_no_numbers():
    assert number_sections([run(), run()]) == []


# -------------------------------------------------------------------------------------------------------- paper


@pytest.mark.parametrize(
    "other",
    [
        {"reference_digest": "b" * 16},
        {"settings": {"image_size": 32}},
        {"num_samples": 300},
        {"resize": "another"},
    ],
)
def test_numbers_from_other_references_or_of_other_images_stand_apart(other):
    first = measured({"fd": 1.0}, reference_digest="a" * 16)
    apart = number_sections([run("a", evaluations=[first]), run("b", evaluations=[replace(first, **other)])])
    assert [row.cells for section in apart for row in section.rows if any(cell.best for cell in row.cells)] == []
    assert len(apart) == 2
    assert "reference aaaaaaaa" in apart[0].note


@pytest.mark.parametrize(("name", "setting"), [("recall", "max_features"), ("kd", "max_features"), ("kd", "seed")])
def test_numbers_of_other_settings_stand_in_rows_of_their_own(name, setting):
    runs = [run(k, evaluations=[measured({name: 0.5 + n}, settings={setting: n})]) for n, k in enumerate("ab")]
    (section,) = number_sections(runs)
    assert [row.name.note for row in section.rows] == [f"{setting} 0", f"{setting} 1"]
    assert not any(cell.best for row in section.rows for cell in row.cells)


def test_notes_and_deviations_come_with_the_numbers():
    first = measured({"kd": 0.5}, deviations={"kd": 0.25}, notes=("Too few images.",))
    (section,) = number_sections([run("a", evaluations=[first]), run("b", evaluations=[replace(first, notes=())])])
    assert section.rows[0].cells[0].note == "± 0.25000"
    assert section.note.endswith(". Too few images.")


def test_the_papers_row_stands_above_the_runs_own_inception_numbers_with_images_and_steps_of_both():
    evaluations = [
        measured({"fd": 12.3}),
        measured({"fid": 27.9, "precision": 0.612}, extractor="inception", num_samples=10_000),
    ]
    table = paper_table([run(model="imagenet256_uncond", settings=PAPER, evaluations=evaluations), run("plain")])
    assert table.note.startswith(
        "Not like for like: the paper measured 50,000 images of 250 steps each, with Inception"
    )
    assert table.heads == ("images", "steps", "FID", "sFID", "IS, chunks of 5,000", "precision", "recall")
    (section,) = table.sections
    assert section.title == "a: imagenet256_uncond, sag.scale 0.5"
    assert texts(section) == {
        "paper, Table 2": ["50,000", "250", "20.31", "5.09", "45.30", "0.66", "0.61"],
        "a": ["10,000", "250 (ddpm)", "27.90", ABSENT, ABSENT, "0.61", ABSENT],
    }


def test_a_run_that_was_not_measured_with_inception_says_so_beside_the_paper():
    settings = PAPER | {"sag.scale": 0.0, "respacing": "ddim25", "sampler": "ddim"}
    evaluations = [measured({"fid": 1.0, "precision": 0.6})]
    (section,) = paper_table([run(model="lsun_cat", settings=settings, evaluations=evaluations)]).sections
    assert section.title == "a: lsun_cat, no guidance"
    assert texts(section)["a"] == ["16", "ddim25", *[ABSENT] * 5]
    assert section.rows[1].name.note == "no numbers of inception yet"


def test_runs_that_the_paper_does_not_have_have_no_table_of_it():
    assert paper_table([run(settings=PAPER), run(settings=PAPER, model=None)]) is None
