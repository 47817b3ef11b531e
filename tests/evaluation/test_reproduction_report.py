import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sagl.evaluation.analysis_labels import LABELS
from sagl.evaluation.paper import paper_items
from sagl.evaluation.reproduction import Target, plan_reproduction
from sagl.evaluation.reproduction_report import store_item, write_report
from sagl.evaluation.results import EvaluationResult, save_result
from sagl.sampling.run_folder import write_run_json
from tests.helpers.errors import refused
from tests.helpers.run_folders import json_result, write_run

REPORTS = Path(__file__).parents[2] / "docs" / "reproduction"
ROW = {
    "name": "a",
    "paper_model": "lsun_cat",
    "paper_values": {"fid": 1.5},
    "command": "sagl sample",
    "folder": "",
    "is_unguided": False,
}
ROW |= {"translation": ["b"], "obstacle": ""}
UNGUIDED, LOW, BEST, HIGH = "unguided", "threshold 0.7", "threshold 1.0", "threshold 1.3"


def test_rows_are_compared_with_the_unguided_one_and_the_papers_best_with_the_others(tmp_path):
    item = paper_items()["table5"]
    rows = plan_reproduction(item, Target())
    store_item(tmp_path, item, rows, ["sagl sample"] * len(rows))
    common = {"extractor": "tiny", "reference": "r", "num_samples": 9, "settings": {"bootstrap": 2, "seed": 0}}
    for row, distance in zip(rows, (20, 17, 18, 21), strict=True):
        folder = tmp_path / "runs" / row.run_name
        folder.mkdir(parents=True)
        resamples = {"fd": (distance - 1.0, distance + 2.0)}
        save_result(folder, EvaluationResult(**common, values={"fd": distance}, resamples=resamples))
        write_run_json(folder, {})
    write_report(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for row, difference in ((rows[1], "-3.00"), (rows[3], "+1.00")):
        line = next(line for line in text.splitlines() if f"| [{row.row.name}](runs/{row.run_name}/run.json) |" in line)
        assert difference in line
    assert f"Lowest distance here: {LOW} (17.00); in the paper, of these rows: {BEST}" in text
    for name, difference in ((UNGUIDED, "-2.00"), (LOW, "+1.00"), (HIGH, "-3.00")):
        assert f"{name} {difference} ({difference} … {difference})" in text


def test_results_without_resamples_have_no_column_of_differences(tmp_path):
    item = paper_items()["table5"]
    rows = plan_reproduction(replace(item, rows=item.rows[:2]), Target())
    store_item(tmp_path, item, rows, ["sagl sample"] * 2)
    for row in rows:
        folder = tmp_path / "runs" / row.run_name
        folder.mkdir(parents=True)
        save_result(folder, EvaluationResult(extractor="tiny", reference="r", num_samples=9, values={"fd": 1.0}))
    write_report(tmp_path)
    assert "minus unguided" not in (tmp_path / "README.md").read_text()
    assert [row["is_unguided"] for row in json.loads((tmp_path / "table5.json").read_text())] == [True, False]


@pytest.mark.parametrize(
    ("name", "num_rows", "respacing"),
    [("emoji", 36, "logsnr10"), ("fashion_mnist", 38, "logsnr10"), ("fashion_mnist_ddim50", 4, "ddim50")],
)
def test_a_report_of_the_documentation_is_that_of_its_stored_runs_and_leads_to_their_settings(
    name, num_rows, respacing, tmp_path
):
    shutil.copytree(REPORTS / name, tmp_path / name)
    write_report(tmp_path / name)
    text = (tmp_path / name / "README.md").read_text()
    assert text == (REPORTS / name / "README.md").read_text()
    runs = [path for path in re.findall(r"\]\((\S+\.json)\)", text) if path.startswith("runs/")]
    settings = [json.loads((REPORTS / name / path).read_text())["settings"] for path in runs]
    assert len(settings) == num_rows
    assert all(entry["seed"] == 0 and entry["respacing"] == respacing for entry in settings)


def test_the_title_names_a_network_that_replaces_the_papers_in_all_rows(tmp_path):
    write_run(tmp_path / "runs" / "a", results=[json_result({"fd": 3.0})])
    row = ROW | {"folder": "runs/a", "name": "x"}
    other, second = (["network my/other.ckpt (paper: lsun_cat)", "b"], ["network third (paper: lsun_cat)"])
    for changes, is_named in (([other], True), ([other, other], True), ([[]], False), ([other, second], False)):
        rows = [row | {"translation": translation} for translation in changes]
        write_report(store(tmp_path, rows=rows))
        title = (tmp_path / "README.md").read_text().splitlines()[0]
        assert ("my/other.ckpt" in title) == is_named


def test_every_number_of_an_analysis_has_a_description():
    """Names of groups are those of blocks and combinations of methods, or have a description of their first word."""
    for path in REPORTS.glob("*/analyses/*/*.json"):
        content = json.loads(path.read_text())
        names = {name for group in content["numbers"].items() for name in _names(*group)}
        assert [name for name in names if "_" in name and name not in LABELS[content["analysis"]]] == []


def _names(name, value):
    nested = value.items() if isinstance(value, dict) else ()
    return {*([] if isinstance(value, list) else [name]), *(found for item in nested for found in _names(*item))}


def store(root, item="table2", rows=None, **changes):
    root.mkdir(exist_ok=True)
    (root / f"{item}.json").write_text(json.dumps([ROW | changes] if rows is None else rows))
    return root


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ["a"]},
        {"paper_values": [1]},
        {"paper_values": {"fid": "x"}},
        {"folder": 3},
        {"folder": "../other"},
        {"folder": "/etc"},
        {"translation": [3]},
        {"obstacle": None},
        {"extra": 1},
        {"rows": {}},
        {"rows": [3]},
    ],
    ids=str,
)
@pytest.mark.parametrize("item", ["table1", "table2"])
def test_a_damaged_row_is_refused_with_its_file(changes, item, tmp_path):
    with refused("`output`", f"{item}.json"):
        write_report(store(tmp_path, item, **changes))
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"[",
        b"{}",
        b'{"numbers": 3}',
        b'{"numbers": {"a": {"estimate": "x", "low": 1, "high": 2}}}',
        b"\xff",
        b"[" * 5000,
    ],
    ids=lambda content: str(content)[:40],
)
def test_damaged_numbers_of_an_analysis_are_refused_with_their_file(content, tmp_path):
    (tmp_path / "analyses" / "r").mkdir(parents=True)
    (tmp_path / "analyses" / "r" / "overlap.json").write_bytes(content)
    with refused("`output`", "overlap.json"):
        write_report(store(tmp_path, "table1", folder="analyses/r"))


def test_names_that_are_not_utf8_and_results_without_a_distance_are_reported(tmp_path):
    write_run(tmp_path / "runs" / "a", results=[json_result({"is": 3.0}, reference="caf\udce9")])
    rows = [ROW | {"folder": "runs/a", "name": name} for name in ("a", "b\udce9")]
    write_report(store(tmp_path, rows=rows))
    assert "caf\\udce9" in (tmp_path / "README.md").read_text(encoding="utf-8")
