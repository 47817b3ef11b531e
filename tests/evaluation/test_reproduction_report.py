import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sagl.evaluation.paper import paper_items
from sagl.evaluation.reproduction import Target, plan_reproduction
from sagl.evaluation.reproduction_report import store_item, write_report
from sagl.evaluation.results import EvaluationResult, save_result
from sagl.sampling.run_folder import write_run_json

REPORTS = Path(__file__).parents[2] / "docs" / "reproduction"
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


@pytest.mark.parametrize("name", ["emoji", "fashion_mnist"])
def test_a_report_of_the_documentation_is_that_of_its_stored_runs_and_leads_to_their_settings(name, tmp_path):
    shutil.copytree(REPORTS / name, tmp_path / name)
    write_report(tmp_path / name)
    text = (tmp_path / name / "README.md").read_text()
    assert text == (REPORTS / name / "README.md").read_text()
    runs = [path for path in re.findall(r"\]\((\S+\.json)\)", text) if path.startswith("runs/")]
    settings = [json.loads((REPORTS / name / path).read_text())["settings"] for path in runs]
    assert len(settings) > 20
    assert all(entry["seed"] == 0 and entry["respacing"] == "logsnr10" for entry in settings)
