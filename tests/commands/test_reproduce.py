import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from sagl.commands.reproduce import _target, reproduce_parser
from sagl.evaluation.paper import paper_items
from sagl.evaluation.results import read_results
from sagl.metrics.extractors import EXTRACTORS
from sagl.models.checkpoints import write_checkpoint
from sagl.models.zoo import RELEASED
from sagl.utils.files import sha256
from sagl.utils.run_lock import LOCK_NAME, lock_folder
from tests.helpers.commands import exit_code
from tests.helpers.extractors import USER_EXTRACTOR, row_means, serve_files, use_fast_extractors, write_npz
from tests.helpers.networks import grey_weights, write_grey_classifier, write_grey_unet, write_training_checkpoint

LEVELS = {"channel_mult": (1, 2), "attention_resolutions": (8, 4)}
ITEMS = ("table1", "table5", "table6", "figure13")


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """Run sagl reproduce on a tiny network; return the exit code."""
    use_fast_extractors(monkeypatch, tmp_path / "cache")
    network = write_grey_unet(tmp_path / "n.safetensors", **LEVELS)
    reference, _ = write_npz(tmp_path / "reference.npz", 20, 0, size=8)

    def run(item, *flags):
        flags = ("--smoke", "--reference", reference, "--output", tmp_path / "r", *flags)
        return exit_code("reproduce", item, "--model", network, *flags)

    return run


def test_tables_and_figures_are_reproduced_once_and_reported_together(reproduce, tmp_path, capsys):
    for item in ITEMS:
        assert reproduce(item) == 0
    runs = sorted((tmp_path / "r" / "runs").iterdir())
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*.tar")}
    assert reproduce("table5") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*.tar")} == written
    (tmp_path / "r" / "index.html").unlink()
    assert exit_code("reproduce", "report", "--output", tmp_path / "r") == 0
    page = (tmp_path / "r" / "index.html").read_text()
    text = (tmp_path / "r" / "README.md").read_text()
    for item in map(paper_items().__getitem__, ITEMS):
        assert f"{item.heading}: {item.title}" in page
        assert item.claim in text
    assert "5.67" in text  # the paper's FID at threshold 0.7
    assert page.count("data:image/png;base64,") == text.count("![") == 3
    sections = text.split("\n## ")[1:]
    assert [section.count("![") for section in sections] == [1, 0, 0, 2]
    for name in re.findall(r"runs/(run_\w+)/grid\.png", text):
        assert tmp_path / "r" / "runs" / name in runs
    rows = json.loads((tmp_path / "r" / "table6.json").read_text())
    assert [bool(row["obstacle"]) for row in rows] == [False, False, True, False]


def files_of(folder, name):
    """Return content and time of the files of a name."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob(name)}


def last_results(folder):
    return [read_results(path.parent)[-1] for path in folder.rglob("evaluation.json")]


def test_an_analysis_is_repeated_when_the_weights_have_changed_under_their_name(reproduce, tmp_path):
    assert reproduce("table1") == 0
    (first,) = files_of(tmp_path, "overlap.json").items()
    assert reproduce("table1") == 0
    assert files_of(tmp_path, "overlap.json") == dict([first])
    network = grey_weights(**LEVELS)
    trained = {name: 1.5 * tensor for name, tensor in network.state_dict.items()}
    write_checkpoint(replace(network, state_dict=trained), tmp_path / "n.safetensors")
    assert reproduce("table1") == 0
    (path,) = files_of(tmp_path, "overlap.json")
    stored = json.loads(path.read_text())
    assert stored["settings"]["weights_sha256"] == sha256(tmp_path / "n.safetensors")
    assert stored["numbers"] != json.loads(first[1][0])["numbers"]


def test_an_analysis_of_a_version_that_did_not_store_its_weights_is_kept(reproduce, tmp_path):
    assert reproduce("table1") == 0
    (path,) = files_of(tmp_path, "overlap.json")
    content = json.loads(path.read_text())
    del content["settings"]["weights_sha256"]
    path.write_text(json.dumps(content))
    before = files_of(tmp_path, "overlap.json")
    assert reproduce("table1") == 0
    assert files_of(tmp_path, "overlap.json") == before


def test_runs_are_evaluated_again_only_when_the_reference_has_changed_under_its_name(reproduce, tmp_path, monkeypatch):
    """The extractor has published weights: it is not loaded for what is done."""
    assert reproduce("table5") == 0
    before = files_of(tmp_path, "evaluation.json")
    with monkeypatch.context() as patch:
        patch.setitem(EXTRACTORS, "effnet_lite0_64", None)
        assert reproduce("table5") == 0
    assert files_of(tmp_path, "evaluation.json") == before
    reference, _ = write_npz(tmp_path / "reference.npz", 20, 1, size=8)
    assert reproduce("table5") == 0
    assert {result.reference_digest for result in last_results(tmp_path)} == {sha256(reference)[:16]}


def test_a_run_that_was_evaluated_over_fewer_images_is_evaluated_again(reproduce, tmp_path):
    assert reproduce("table5") == 0
    run = next((tmp_path / "r" / "runs").iterdir())
    flags = ("--reference", tmp_path / "reference.npz", "--num_samples", 3, "--num_neighbors", 2)
    assert exit_code("evaluate", run, *flags) == 0
    assert {result.num_samples for result in last_results(tmp_path)} == {3, 4}
    assert reproduce("table5") == 0
    assert {result.num_samples for result in last_results(tmp_path)} == {4}


def test_results_without_a_digest_of_the_reference_are_kept(reproduce, tmp_path):
    assert reproduce("table5") == 0
    for path in files_of(tmp_path, "evaluation.json"):
        results = json.loads(path.read_text())["results"]
        for name in ("reference_digest", "reference_crop_size"):
            del results[0][name]
        path.write_text(json.dumps({"results": results}))
    before = files_of(tmp_path, "evaluation.json")
    assert reproduce("table5") == 0
    assert files_of(tmp_path, "evaluation.json") == before


@pytest.mark.parametrize("extractor", ["inception", USER_EXTRACTOR])
def test_runs_are_evaluated_again_for_other_weights_or_code_of_the_extractor(
    extractor, reproduce, tmp_path, monkeypatch
):
    flags, evaluations = ("table5", "--extractor", extractor), []
    monkeypatch.setenv("SAGL_INCEPTION", "weights of the user")
    for version in ("a", "a", "b"):

        def extract(images):
            return row_means(images)

        extract.version = version
        monkeypatch.setitem(EXTRACTORS, "inception", lambda device, e=extract: e)
        monkeypatch.setattr("tests.helpers.extractors.user_extractor", lambda device, e=extract: e)
        assert reproduce(*flags) == 0
        evaluations.append(files_of(tmp_path, "evaluation.json"))
    assert evaluations[0] == evaluations[1] != evaluations[2]
    assert {result.extractor_version[0] for result in last_results(tmp_path)} == {"b"}


def test_the_extractor_is_that_of_a_statistics_file_at_a_url(reproduce, tmp_path, monkeypatch):
    serve_files(monkeypatch, tmp_path)
    statistics = ("--extractor", "inception", "--output", tmp_path / "s.npz")
    assert exit_code("statistics", tmp_path / "reference.npz", *statistics) == 0
    assert reproduce("table5", "--reference", "https://host/s.npz") == 0
    assert {(r.extractor, r.reference) for r in last_results(tmp_path)} == {("inception", "https://host/s.npz")}


@pytest.mark.slow
def test_every_table_and_figure_has_a_smoke_form(reproduce, tmp_path):
    assert reproduce("all") == 0
    for item in paper_items().values():
        for row in json.loads((tmp_path / "r" / f"{item.name}.json").read_text()):
            names = {path.name for path in (tmp_path / "r" / row["folder"]).iterdir()} if row["folder"] else set()
            expected = (
                f"{item.analysis}.json" if item.analysis else "grid.png" if item.shows_samples else "evaluation.json"
            )
            assert bool(row["obstacle"]) != (expected in names)


def test_a_folder_that_another_command_holds_is_not_changed(reproduce, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sagl.utils.run_lock.LOCK_TIMEOUT_SECONDS", 0.2)
    with lock_folder(tmp_path / "r"):
        assert reproduce("figure13") == 2
        assert [path.name for path in (tmp_path / "r").iterdir()] == [LOCK_NAME]
    assert str(tmp_path / "r") in capsys.readouterr().err


def test_several_processes_run_as_a_child_command_whose_exit_code_is_kept(reproduce, monkeypatch):
    commands = []

    def run(words, check):
        commands.append(words)
        return subprocess.CompletedProcess(words, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert reproduce("figure13", "--devices", "2") == 3
    ((*program, command), flags) = commands[0][:4], commands[0][4:]
    assert (program, command) == ([sys.executable, "-m", "sagl"], "sample")
    assert flags[flags.index("--trainer.devices") + 1] == "2"
    assert len(commands) == 1


def test_table7_prints_the_settings_of_every_row_and_writes_nothing(tmp_path, capsys):
    assert exit_code("reproduce", "table7", "--output", tmp_path / "r") == 0
    out = capsys.readouterr().out
    assert out.count("--sag.kernel_size 31") >= 20
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("table11",), ("item", "table11", "table10")),
        (("report",), ("--output", "none")),
        (("table5", "--num_samples", "1"), ("--num_samples", "1")),
        (("table5",), ("--reference",)),
        (("table5", "--sampler", "euler"), ("--sampler", "euler")),
        (("table5", "--model", "nothing"), ("--model", "nothing")),
    ],
)
def test_what_cannot_be_reproduced_is_refused_in_one_line(arguments, names, tmp_path, capsys):
    assert exit_code("reproduce", *arguments, "--output", tmp_path / "r") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(name in line for name in names)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--bootstrap", "3"),
        ("--extractor", "nope"),
        ("--devices", "many"),
        ("--reference", "absent"),
        ("--object_masks", "absent"),
        ("--dino_checkpoint", "absent"),
        ("--model", "classifier.safetensors"),
    ],
)
def test_a_setting_that_only_a_later_step_needs_is_refused_before_the_first(flag, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_grey_classifier(tmp_path / "classifier.safetensors")
    write_grey_unet(tmp_path / "n.safetensors")
    arguments = ["--model", "n.safetensors", "--bootstrap", 0, "--reference", "emoji_test", flag, value]
    assert exit_code("reproduce", "table5", *arguments) == 2
    error = capsys.readouterr().err
    assert flag.strip("-") in error
    assert value in error
    assert not (tmp_path / "reproduction").exists()


def test_a_training_checkpoint_is_a_network_too(tmp_path, capsys):
    path = write_training_checkpoint(tmp_path / "last.ckpt")
    assert exit_code("reproduce", "table7", "--model", path) == 0
    assert f"--checkpoint {path}" in capsys.readouterr().out


def test_the_file_of_a_released_network_has_the_recommendations_of_its_name(tmp_path):
    path = tmp_path / RELEASED["lsun_cat"].file
    path.touch()
    by_name, by_file = (_target(reproduce_parser().parse(["table1", "--model", m])) for m in ("lsun_cat", str(path)))
    assert by_file.recommended == by_name.recommended != {}
