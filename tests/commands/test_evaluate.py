import csv
import io
import json

import pytest
import torch

from tests.helpers.commands import exit_code, refusal
from tests.helpers.extractors import BATCH_SIZES, use_fast_extractors, write_pair
from tests.helpers.run_folders import write_run


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Paths of 40 images and of 50."""
    use_fast_extractors(monkeypatch, tmp_path / "cache")
    return write_pair(tmp_path)[:2]


def evaluate(capsys, *arguments):
    """The result that the command prints as JSON."""
    assert exit_code("evaluate", *arguments, "--format", "json", "--progress", "off") == 0
    return json.loads(capsys.readouterr().out)


def test_flags_reach_the_evaluation(pair, capsys):
    flags = ("--num_samples", 20, "--kid_subset_size", 10, "--batch_size", 7, "--trainer.accelerator", "cpu")
    result = evaluate(capsys, pair[0], "--reference", pair[1], *flags)
    assert (result["num_samples"], result["settings"]["kid_subset_size"]) == (20, 10)
    assert max(BATCH_SIZES) == 7


def test_more_neighbours_than_images_are_refused_before_the_work(pair, tmp_path, capsys):
    flags = ("--num_samples", 20, "--num_neighbors", 20)
    refusal(capsys, tmp_path, "evaluate", pair[0], "--reference", pair[1], *flags, names=["--num_neighbors"])
    assert BATCH_SIZES == []


def test_a_run_saves_one_result_per_measurement(tmp_path, pair, capsys):
    run = write_run(tmp_path / "run", image_size=16)
    for subsets in (5, 6, 5):
        evaluate(capsys, run, "--reference", pair[1], "--kid_subsets", subsets)
    results = json.loads((run / "evaluation.json").read_text())["results"]
    assert [result["settings"]["kid_subsets"] for result in results] == [6, 5]
    again = evaluate(capsys, run, "--reference", pair[1], "--kid_subsets", 5)
    assert results[1]["values"] == again["values"]
    (run / "evaluation.json").write_text("{")
    BATCH_SIZES.clear()
    refusal(capsys, run, "evaluate", run, "--reference", pair[1], names=["evaluation.json"])
    assert BATCH_SIZES == []  # refused before the work


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, pair, capsys):
    existing = tmp_path / "existing.json"
    existing.write_text("precious")
    (tmp_path / "folder.json").mkdir()
    arguments = (pair[0], "--reference", pair[1], "--output")
    for output in (existing, tmp_path / "folder.json", existing / "below.json", tmp_path / "n.txt"):
        refusal(capsys, tmp_path, "evaluate", *arguments, output, names=["--output"])
    assert BATCH_SIZES == []
    assert evaluate(capsys, *arguments, existing, "--overwrite") == json.loads(existing.read_text())


def test_the_result_is_printed_as_a_table_and_written_as_json_and_csv(tmp_path, pair, capsys):
    arguments = ("evaluate", pair[0], "--reference", pair[1], "--bootstrap", 20, "--progress", "off")
    assert exit_code(*arguments, "--output", tmp_path / "deep" / "n.json") == 0
    table = capsys.readouterr().out
    result = json.loads((tmp_path / "deep" / "n.json").read_text())
    low, high = result["intervals"]["fd"]
    for text in ("Fréchet distance", "recall", "40 images", "50 images", f"{result['values']['fd']:.2f}"):
        assert text in table
    assert f"{low:,.2f} … {high:,.2f}" in table
    assert "kid_subset_size 40" in table.replace("\n", "")
    assert exit_code(*arguments, "--format", "csv", "--output", tmp_path / "n.csv") == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "n.csv").read_text() == printed
    rows = {row["metric"]: row for row in csv.DictReader(io.StringIO(printed))}
    assert (float(rows["fd"]["value"]), float(rows["fd"]["low"])) == (result["values"]["fd"], low)
    assert (rows["kd"]["extractor"], rows["kd"]["num_reference"]) == ("effnet_lite0_64", "50")
    assert rows["kd"]["reference_digest"] == result["reference_digest"] != ""
    assert "kid_subset_size 40" in rows["kd"]["settings"]
    assert "±" not in table  # the subsets of the 40 images are equal
    assert exit_code(*arguments, "--kid_subset_size", 20) == 0
    assert "± " in capsys.readouterr().out


def test_statistics_writes_a_file_that_evaluate_reads(tmp_path, pair, capsys):
    file = tmp_path / "statistics.npz"
    arguments = (pair[1], "--output", file, "--extractor", "inception")
    assert exit_code("statistics", *arguments, "--progress", "off") == 0
    assert str(file) in capsys.readouterr().out
    assert evaluate(capsys, pair[0], "--reference", file)["num_reference"] == 50
    for refused in (arguments, (pair[1], "--output", "a.txt")):
        refusal(capsys, tmp_path, "statistics", *refused, names=["--output"])
    assert exit_code("statistics", *arguments, "--overwrite", "--max_features", 5, "--progress", "off") == 0
    capsys.readouterr()
    assert evaluate(capsys, pair[0], "--reference", file)["settings"]["max_features"] == 5


def test_an_accelerator_that_is_absent_is_refused(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = ["--trainer.accelerator", "gpu"]
    refusal(capsys, tmp_path, "evaluate", pair[0], "--reference", pair[1], *gpu, names=gpu)
