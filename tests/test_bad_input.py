"""What cannot be met ends in one line that names it and exit code 2, and leaves everything as it was."""

import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.helpers.tiny import contents, exit_code, write_tiny, write_training_checkpoint

SHORT = ("--respacing", "2", "--num_samples", "2", "--progress", "off")
SITES = ("input.1 (8x8)", "middle (8x8)", "output.0 (8x8)", "output.1 (8x8)")


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """An empty folder to work in, with nothing cached."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(here)
    return here


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("network") / "tiny.safetensors")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return write_training_checkpoint(tmp_path_factory.mktemp("network") / "tiny.ckpt")


@pytest.fixture
def refused(capsys, workdir):
    """Run what must be refused; returns the one line, once nothing below the working folder has changed."""

    def run(*arguments, below=workdir):
        before, names = contents(below), sorted(below.rglob("*"))
        assert exit_code(*arguments) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"sagl {arguments[0]}: ")
        assert said.err.endswith("\n")
        assert len(said.err.splitlines()) == 1
        assert "Traceback" not in said.err
        assert sorted(below.rglob("*")) == names
        assert contents(below) == before
        return said.err

    return run


@pytest.fixture
def made(tiny, workdir, capsys):
    """A small run that is complete."""
    assert exit_code("sample", "--checkpoint", tiny, *SHORT, "--output", "run") == 0
    capsys.readouterr()
    return workdir / "run"


def flags_id(value):
    return " ".join(value)[:40] if isinstance(value, list) else ""


# ------------------------------------------------------------------------------------------------ command lines


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--num_samples", "many"], ("--num_samples", "many")),  # wrong type
        (["--num_samples", "0"], ("--num_samples", "got 0")),  # out of range
        (["--sag.scale", "1e400"], ("--sag.scale", "inf")),  # not finite
        (["--sag.scale="], ("--sag.scale", "nothing")),  # empty
        (["--sag.interval", "0.5-0.8"], ("--sag.interval", "0.5,1.0", "0.5-0.8")),  # wrong form
        (["--sampler", "euler"], ("--sampler", "ddpm, ddim", "euler")),  # unknown choice
        (["--exports", "grid,film"], ("--exports", "strip", "film")),
        (["--num_sample", "3"], ("--num_sample", "Did you mean --num_samples?")),  # unknown option
        (["--sag", "3"], ("--sag",)),
        (["--sag.site"], ("--sag.site",)),  # missing value
        (["stray"], ("stray",)),
        (["--eta", "0.5"], ("--eta", "--sampler")),  # contradiction
        (["--compare"], ("--compare", "--sag.scale")),
        (["--classifier.scale", "1"], ("--classifier.scale", "--classifier.checkpoint")),
        (["--sag.scale", "0.5", "--sag.site", "output.9"], ("site", *SITES, "output.9")),  # does not fit the network
        (["--labels", "7"], ("--labels", "0 … 2", "7")),
        (["--respacing", "1001"], ("--respacing", "1001", "1000")),
        (["--model", "lsun_cats"], ("--model", "Did you mean lsun_cat?")),  # unknown name
        (["--config", "absent.yaml"], ("--config", "absent.yaml")),  # missing file
        (["--checkpoint", "absent.safetensors"], ("--checkpoint", "absent.safetensors")),
        (["--weights", "raw"], ("--weights", "raw")),
        (["--output", "n" * 300], ("--output",)),
    ],
    ids=flags_id,
)
def test_a_request_that_cannot_be_met_is_refused_in_one_line(flags, names, refused, tiny):
    message = refused("sample", "--checkpoint", tiny, "--output", "run", *SHORT, *flags)
    assert [name for name in names if name not in message] == []


@pytest.mark.parametrize("name", ["imagenet64_classifer", "absent.safetensors", "damaged.safetensors"])
def test_an_unusable_classifier_is_refused_by_the_name_of_its_flag(name, refused, tiny, workdir):
    (workdir / "damaged.safetensors").write_bytes(b"damaged")
    message = refused("sample", "--checkpoint", tiny, *SHORT, "--classifier.scale", 1, "--classifier.checkpoint", name)
    assert "--classifier.checkpoint" in message
    assert name in message


# -------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("num_sample: 3", ("num_sample", "num_samples")),  # unknown key
        ("sag: {scal: 0.5}", ("sag.scal", "sag.scale")),
        ("trainer: {precison: bf16-true}", ("trainer.precison", "trainer.precision")),
        ("model: {netwrok: lsun_cat}", ("model.netwrok", "model.network")),
        ("model: {network: ''}", ("--model", "''")),  # no network has this name
        ("model: lsun_cat", ("model", "mapping")),  # not a mapping
        ("sag: 3", ("sag", "mapping", "3")),
        ("sag: {scale: .nan}", ("sag.scale", "nan")),  # wrong value
        ("sag: {blur_sigma: null}", ("sag.blur_sigma", "null")),
        ("seed: [3]", ("seed", "[3]")),
        ("compare: yes please", ("compare", "yes please")),
        ("", ("--config", "mapping")),
        ("- seed", ("--config", "mapping")),
        ("a: b: c", ("--config", "YAML")),  # not YAML
        ("\0", ("--config", "YAML")),
        (b"labels: \xe9", ("--config",)),
        ("seed: !!python/name:os.system", ("--config",)),
        ("[" * 3000, ("--config",)),
        ("seed: " + "9" * 5000, ("--config",)),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, (str, bytes)) else "",
)
def test_an_invalid_config_is_refused_in_one_line(text, names, refused, tiny, workdir):
    (workdir / "my.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    message = refused("sample", "--config", "my.yaml", "--checkpoint", tiny, "--output", "run", *SHORT)
    assert [name for name in names if name not in message] == []


def test_a_config_runs_no_code(refused, tiny, workdir):
    text = f"labels: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{workdir}/mark]]"
    (workdir / "my.yaml").write_text(text)
    refused("sample", "--config", "my.yaml", "--checkpoint", tiny, *SHORT)
    assert not (workdir / "mark").exists()


# ------------------------------------------------------------------------------------------------------- files


class RunsCode:
    """Unpickled, it makes a folder."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def save_state(target, source, change):
    """A copy of a safetensors file, its settings kept and its tensors changed."""
    with safe_open(source, "pt") as file:
        about, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(change(state), target, metadata=about)


@pytest.mark.parametrize("verb", ["sample", "convert"])
@pytest.mark.parametrize("kept", [0, 5, 3000, -1])
@pytest.mark.parametrize("kind", ["tiny", "training"])
def test_a_truncated_file_is_refused_as_damaged(kind, kept, verb, refused, workdir, request):
    whole = request.getfixturevalue(kind)
    cut = workdir / f"cut{whole.suffix}"
    cut.write_bytes(whole.read_bytes()[:kept])
    arguments = {"sample": ["--checkpoint", cut, *SHORT], "convert": [cut, "new.safetensors"]}[verb]
    said = refused(verb, *arguments)
    assert "checkpoint" in said
    assert "damaged" in said
    assert str(cut) in said


@pytest.mark.parametrize("verb", ["sample", "convert"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: dict(list(state.items())[7:]), "file has none"),
        (lambda state: {**state, **{f"stray.{k}": torch.zeros(1) for k in range(7)}}, "settings have none, file (1,)"),
        (lambda s: {k: v[None].clone() if i < 7 else v for i, (k, v) in enumerate(s.items())}, "file (1, 32"),
    ],
    ids=["missing", "stray", "shaped otherwise"],
)
def test_a_checkpoint_of_other_settings_is_refused_with_the_first_five_that_differ(
    change, told, verb, refused, tiny, workdir
):
    save_state(workdir / "other.safetensors", tiny, change)
    more = {
        "sample": ["--checkpoint", "other.safetensors", *SHORT],
        "convert": ["other.safetensors", "new.safetensors"],
    }
    said = refused(verb, *more[verb])
    assert "checkpoint" in said
    assert "7 parameters differ" in said
    assert told in said
    assert said.count("settings (") + said.count("settings have none") == 5


def test_a_training_checkpoint_of_other_settings_is_refused_with_their_shapes(refused, training):
    parts = torch.load(training, weights_only=True)
    parts["hyper_parameters"]["network"]["num_channels"] = 64
    torch.save(parts, "other.ckpt")
    said = refused("sample", "--checkpoint", "other.ckpt", *SHORT)
    assert "(64,)" in said
    assert "(32,)" in said
    assert said.count("settings (") == 5


@pytest.mark.parametrize("wrap", [pickle.dump, lambda thing, file: torch.save({"state_dict": thing}, file)])
@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", *SHORT, "--checkpoint", "code.ckpt"],
        ["sample", *SHORT, "--checkpoint", "code.pt", "--model", "imagenet64"],
        ["convert", "code.ckpt", "new.safetensors"],
        ["convert", "code.pt", "new.safetensors", "--model", "imagenet64"],
    ],
    ids=lambda arguments: " ".join(arguments[-3:]),
)
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(arguments, wrap, refused, workdir):
    for name in ("code.ckpt", "code.pt"):
        with (workdir / name).open("wb") as file:
            wrap(RunsCode(workdir / "mark"), file)
    said = refused(*arguments)
    assert "checkpoint" in said
    assert ".safetensors" in said
    assert not (workdir / "mark").exists()


def test_the_pickle_would_run_its_code_elsewhere(workdir):
    pickle.loads(pickle.dumps(RunsCode(workdir / "mark")))
    assert (workdir / "mark").is_dir()


@pytest.mark.parametrize("weights", ["best", "ema:", "ema:nan", "ema:0.5", "ema:word"])
def test_weights_that_a_training_checkpoint_lacks_are_refused_with_those_it_has(weights, refused, training):
    said = refused("sample", "--checkpoint", training, "--weights", weights, *SHORT)
    assert "--weights" in said
    assert repr(weights) in said


# ----------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seed", "1"], ("seed 0", "got 1")),
        (["--respacing", "3"], ("respacing '2'", "got '3'")),
        (["--labels", "0,1"], ("labels 'random'", "got '0,1'")),
        (["--sag.threshold", "2"], ("sag.threshold 1.0", "got 2.0")),
        (["--seed", "1", "--sag.threshold", "2"], ("seed 0", "got 1")),
    ],
    ids=flags_id,
)
def test_a_folder_with_another_run_is_refused_with_the_first_setting_that_differs(flags, named, refused, made, tiny):
    said = refused("sample", "--checkpoint", tiny, "--output", made, *SHORT, *flags)
    assert "--output" in said
    assert [part for part in named if part not in said] == []


def test_a_folder_with_the_run_of_another_network_is_refused(refused, made, workdir):
    other = write_tiny(workdir / "other.safetensors", num_classes=4)
    assert "--output" in refused("sample", "--checkpoint", other, "--output", made, *SHORT)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"{}", b'{"settings": 3}', b"\xff"])
def test_a_folder_whose_record_is_damaged_is_refused(damage, refused, made, tiny):
    (made / "run.json").write_bytes(damage)
    assert str(made) in refused("sample", "--checkpoint", tiny, "--output", made, *SHORT)


def test_a_folder_with_foreign_files_is_refused_and_they_stay(refused, tiny, workdir):
    (workdir / "photos").mkdir()
    (workdir / "photos" / "holiday.jpg").write_bytes(b"sun")
    said = refused("sample", "--checkpoint", tiny, "--output", "photos", *SHORT)
    assert "--output" in said
    assert "holiday.jpg" in said


@pytest.mark.parametrize("output", ["file", "file/run", "file/deep/run"])
def test_an_output_below_a_file_is_refused(output, refused, tiny, workdir):
    (workdir / "file").write_text("mine")
    said = refused("sample", "--checkpoint", tiny, "--output", output, *SHORT)
    assert "--output" in said


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--npz", "file/new.npz"], "npz"),
        (["--grid", "file/new.png"], "grid"),
        (["--images", "file/new"], "images"),
        (["--images", "file"], "images"),
        (["--npz", "."], "npz"),
        (["--grid", "."], "grid"),
        (["--npz", "new.npz", "--num_samples", "0"], "num_samples"),
        (["--npz", "new.npz", "--num_samples", "3"], "num_samples"),
        (["--npz", "new.npz", "--num_samples", "nan"], "num_samples"),
    ],
    ids=flags_id,
)
def test_an_export_that_cannot_be_written_is_refused(flags, named, refused, made, workdir):
    (workdir / "file").write_text("mine")
    assert f"--{named}" in refused("export", made, *flags)


@pytest.mark.parametrize("verb", ["export", "evaluate"])
@pytest.mark.parametrize("run", ["absent", ".", "file"])
def test_what_is_no_run_is_refused(run, verb, refused, workdir):
    (workdir / "file").write_text("mine")
    flags = ["--npz", "new.npz"] if verb == "export" else []
    said = refused(verb, run, *flags)
    assert "run" in said
    assert run in said


@pytest.mark.parametrize(("target", "named"), [("new.bin", "target"), ("file/new.safetensors", "file"), ("", "target")])
def test_a_conversion_that_cannot_be_written_is_refused(target, named, refused, tiny, workdir):
    (workdir / "file").write_text("mine")
    assert named in refused("convert", tiny, target)


@pytest.mark.parametrize(
    "arguments", [["export"], ["evaluate"], ["convert"], ["completion", "csh"], ["doctor", "now"]], ids=flags_id
)
def test_a_verb_without_what_it_needs_is_refused(arguments, refused):
    refused(*arguments)


# ------------------------------------------------------------------------------------- other rights, and no room

REPORT = """
import contextlib, io, json, os, resource, sys
from sagl.cli import main

def run(*arguments):
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    return code, said.getvalue()
"""


def reported(program, *arguments):
    """What a program of its own process says as JSON; it has `run(...)`, which returns code and stderr."""
    command = [sys.executable, "-c", REPORT + program, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def assert_refused(answer, *named):
    code, said = answer
    assert code == 2, answer
    assert said.startswith("sagl ")
    assert len(said.splitlines()) == 1
    assert [part for part in named if part not in said] == []


ENDLESS = """
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
print(json.dumps(run(*sys.argv[1:])))
"""


@pytest.mark.parametrize("flags", [["--num_samples", "9" * 25], ["--num_samples", str(2**32 + 1)]], ids=flags_id)
def test_more_images_than_there_are_ids_are_refused_at_once(flags, tiny):
    assert_refused(reported(ENDLESS, "sample", "--checkpoint", tiny, *SHORT, "--dry_run", *flags), "--num_samples")


NO_ROOM = """
verb, limits, out = json.loads(sys.argv[1])
answers = []
for limit in limits:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    answers.append(run(*[str(part).replace("LIMIT", str(limit)) for part in verb]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(answers))
"""
LIMITS = [0, 100, 1500, 5000]


def test_the_limit_on_files_can_be_set():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] in (resource.RLIM_INFINITY, -1)


def test_images_that_overflow_are_not_kept(refused, tiny):
    flags = ["--clip_x0", "false", "--sag.scale", "1e300", "--sag.site", "middle", "--sag.kernel_size", "3"]
    flags += ["--batch_size", "2", "--trainer.precision", "32-true"]
    said = refused("sample", "--checkpoint", tiny, "--output", "run", *SHORT, *flags)
    assert "--sag.scale" in said


def test_no_room_for_a_run_ends_in_one_line_and_the_same_command_goes_on(tiny, workdir, capsys):
    run = ["sample", "--checkpoint", str(tiny), *SHORT, "--output"]
    for limit, answer in zip(LIMITS, reported(NO_ROOM, json.dumps([[*run, "runLIMIT"], LIMITS, ""])), strict=True):
        assert_refused(answer, "--output", f"run{limit}")
        left = [path for path in workdir.glob(f"run{limit}/**/*") if path.is_file()]
        assert [path for path in left if path.suffix in (".tar", ".png", ".npz", ".partial", ".gif")] == []
        assert [path.name for path in left if path.name != "run.json"] == []
        assert all(json.loads(path.read_text()) for path in left)
        assert exit_code(*run, f"run{limit}") == 0
        assert len(list((workdir / f"run{limit}" / "images").iterdir())) == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "limits"),
    [
        (["convert", "TINY", "LIMIT.safetensors"], [0, 100, 10_000]),
        (["export", "RUN", "--npz", "LIMIT.npz"], [0, 100]),
        (["export", "RUN", "--grid", "LIMIT.png"], [0, 100]),
        (["export", "RUN", "--images", "LIMIT"], [0, 100]),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value[0], str) else "",
)
def test_no_room_for_one_file_leaves_none(arguments, limits, tiny, made, workdir):
    before, names = contents(workdir), sorted(workdir.rglob("*"))
    verb = [{"TINY": str(tiny), "RUN": str(made)}.get(part, part) for part in arguments]
    for limit, answer in zip(limits, reported(NO_ROOM, json.dumps([verb, limits, ""])), strict=True):
        assert_refused(answer, str(limit))
    assert sorted(workdir.rglob("*")) == names
    assert contents(workdir) == before


NO_RIGHT = """
from pathlib import Path
folder = Path(sys.argv[1])
short = ("--respacing", "2", "--num_samples", "2", "--progress", "off")
net, run_folder = folder / "tiny.safetensors", folder / "run"
assert run("sample", "--checkpoint", net, *short, "--output", run_folder)[0] == 0
for warm in (["--npz", folder / "w.npz"], ["--grid", folder / "w.png"], ["--images", folder / "w"]):
    assert run("export", run_folder, *warm)[0] == 0
assert run("convert", net, folder / "w.safetensors")[0] == 0
(folder / "secret.yaml").write_text("seed: 1")
(folder / "secret.safetensors").write_bytes(net.read_bytes())
for name in ("secret.yaml", "secret.safetensors"):
    (folder / name).chmod(0o600)
os.environ["HOME"] = "/nonexistent"
os.setgid(65534); os.setuid(65534)
before = sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))
sample = ("sample", "--checkpoint", net, *short)
answers = {
    "new": run(*sample, "--output", folder / "new"),
    "deep": run(*sample, "--output", folder / "deep" / "new"),
    "more": run(*sample, "--output", run_folder, "--num_samples", "3"),
    "same": run(*sample, "--output", run_folder),
    "checkpoint": run("sample", "--checkpoint", folder / "secret.safetensors", *short, "--output", folder / "new"),
    "config": run(*sample, "--config", folder / "secret.yaml", "--output", folder / "new"),
    "convert": run("convert", net, folder / "new.safetensors"),
    "unread": run("convert", folder / "secret.safetensors", "/tmp/never.safetensors"),
    "npz": run("export", run_folder, "--npz", folder / "new.npz"),
    "grid": run("export", run_folder, "--grid", folder / "new.png"),
    "images": run("export", run_folder, "--images", folder / "new"),
}
after = sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))
print(json.dumps({**answers, "unchanged": before == after}))
"""


@pytest.fixture(scope="module")
def without_rights():
    """What a user who may only read is told."""
    if os.geteuid() != 0:
        pytest.skip("only root can become a user without rights: this test has checked nothing")
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        write_tiny(Path(name) / "tiny.safetensors").chmod(0o644)
        return reported(NO_RIGHT, name)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("new", "--output"),
        ("deep", "--output"),
        ("more", "--output"),
        ("checkpoint", "checkpoint"),
        ("config", "--config"),
        ("convert", "new.safetensors"),
        ("unread", "checkpoint"),
        ("npz", "--npz"),
        ("grid", "--grid"),
        ("images", "--images"),
    ],
)
def test_who_may_not_read_or_write_is_told_in_one_line(what, named, without_rights):
    assert_refused(without_rights[what], named)


def test_who_may_not_write_changes_nothing(without_rights):
    assert without_rights["unchanged"]


def test_who_may_not_write_finds_a_whole_run_whole(without_rights):
    assert without_rights["same"] == [0, ""]
