"""A request that cannot be met ends in one line with its name and exit code 2, and changes no file.

There is one case per kind of input. The values that a parameter allows are tested with settings, parser and readers.
"""

import codecs
import json
import os
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from sagl.commands.subcommands import SUBCOMMANDS
from tests.helpers.commands import exit_code, refusal
from tests.helpers.networks import write_grey_unet

OVERFLOW = ["--sag.scale", "1e300", "--sag.site", "middle", "--sag.kernel_size", "3", "--clip_x0", "false"]
SHORT = ("--respacing", "2", "--num_samples", "2", "--progress", "off")


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """A working directory with a text file, and a cache folder that does not exist."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "file").write_text("text")
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_grey_unet(tmp_path_factory.mktemp("network") / "tiny.safetensors")


def arguments_id(value):
    return " ".join(value)[:40] if isinstance(value, list) else ""


# ------------------------------------------------------------------------------------------------ command lines


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--num_samples", "many"], ("--num_samples", "many")),  # wrong type
        (["--num_samples", "0"], ("--num_samples", "0")),  # out of range
        (["--sag.scale", "1e400"], ("--sag.scale", "inf")),
        (["--sag.scale="], ("--sag.scale",)),  # empty
        (["--sag.interval", "0.5-0.8"], ("--sag.interval", "0.5-0.8")),  # wrong form
        (["--exports", "grid,film"], ("--exports", "strip", "film")),  # unknown choice
        (["--num_sample", "3"], ("--num_sample", "Did you mean --num_samples?")),  # unknown option
        (["--sag", "3"], ("--sag",)),
        (["--sag.site"], ("--sag.site",)),  # missing value
        (["stray"], ("stray",)),
        (["--eta", "0.5"], ("--eta", "--sampler")),  # contradiction
        (["--compare"], ("--compare", "--sag.scale")),
        (["--sag.scale", "0.5", "--sag.site", "output.9"], ("--sag.site", "output.1 (8x8)", "output.9")),  # network
        (["--labels", "7"], ("--labels", "0 … 2", "7")),
        (["--respacing", "1001"], ("--respacing", "1001", "1000")),
        (["--respacing", "1"], ("--respacing", "'1'")),  # a chain that begins without noise
        (["--respacing", "ddim1"], ("--respacing", "'ddim1'")),
        (["--model", "lsun_cats"], ("--model", "lsun_cat?")),  # unknown name
        (
            ["--classifier.scale", "1", "--classifier.checkpoint", "imagenet64_x"],
            ("--classifier.checkpoint", "imagenet64_x"),
        ),
        (["--checkpoint", "absent.pt"], ("--checkpoint", "absent.pt")),  # missing file
        (["--checkpoint", "file"], ("--checkpoint", "file")),  # damaged file
        (["--classifier.scale", "1", "--classifier.checkpoint", "file"], ("--classifier.checkpoint", "file")),
        (["--weights", "raw"], ("--weights", "raw")),
        (["--output", "file/run"], ("--output", "file")),  # impossible place
        (["--output", "n" * 300], ("--output",)),
        (["--trainer.num_nodes", "2"], ("--trainer.num_nodes",)),  # machine
        (OVERFLOW, ("--sag.scale",)),
    ],
    ids=arguments_id,
)
def test_a_run_that_is_impossible_is_refused_with_its_flag(flags, parts, workdir, tiny, capsys):
    common = ["--checkpoint", tiny, "--output", "run", *SHORT, "--batch_size", "2", "--trainer.precision", "32-true"]
    refusal(capsys, workdir, "sample", *common, *flags, names=parts)


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_every_command_refuses_an_unknown_option(command, workdir, capsys):
    refusal(capsys, workdir, command, "--nonsense=1", names=["--nonsense"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "absent", "--npz", "new.npz"],
        ["export", "file", "--npz", "new.npz"],
        ["evaluate", "absent"],
        ["statistics", "absent", "--output", "new.npz"],
        ["convert", "absent.ckpt", "new.safetensors"],
        ["compare", "absent"],
        ["validate", "absent"],
        ["validate", "--config", "fashion_mnist", "--checkpoint", "absent.ckpt"],
        ["fit", "--config", "absent.yaml", "--output", "run"],
        ["shard", "absent", "--output", "shards"],
    ],
    ids=arguments_id,
)
def test_an_input_that_does_not_exist_is_named(arguments, workdir, capsys):
    name = next(argument for argument in arguments if argument.split(".")[0] in ("absent", "file"))
    refusal(capsys, workdir, *arguments, names=[name])


@pytest.mark.parametrize("command", ["export", "evaluate", "convert", "statistics", "shard", "fit", "validate"])
def test_a_command_without_its_input_is_refused(command, workdir, capsys):
    refusal(capsys, workdir, command)


# ----------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("num_sample: 3", ("num_sample", "num_samples")),  # unknown key
        ("sag: {scal: 0.5}", ("sag.scal", "sag.scale")),
        ("trainer: {precison: bf16-true}", ("trainer.precison", "trainer.precision")),
        ("model: {netwrok: lsun_cat}", ("model.netwrok", "model.network")),
        ("model: {network: ''}", ("--model", "''")),  # unknown name
        ("model: lsun_cat", ("model", "mapping")),  # not a mapping
        ("sag: 3", ("sag", "mapping", "3")),
        ("- seed", ("--config", "mapping")),
        ("sag: {scale: .nan}", ("sag.scale", "nan")),  # wrong value
        ("sag: {blur_sigma: null}", ("sag.blur_sigma", "null")),
        ("compare: yes please", ("compare", "yes please")),
        ("a: b: c", ("--config", "YAML")),  # not YAML
        (b"labels: \xe9", ("--config",)),
        ("seed: !!python/name:os.system", ("--config",)),
        ("[" * 700, ("--config",)),
        ("seed: " + "9" * 5000, ("--config",)),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, (str, bytes)) else "",
)
def test_an_invalid_config_is_refused(text, parts, tiny, workdir, capsys):
    (workdir / "my.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    command = ["sample", "--config", "my.yaml", "--checkpoint", tiny, "--output", "run", *SHORT]
    refusal(capsys, workdir, *command, names=parts)


def test_a_config_runs_no_code(workdir, capsys):
    code = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{workdir}/touched]]"
    (workdir / "my.yaml").write_text(f"labels: {code}")
    refusal(capsys, workdir, "sample", "--config", "my.yaml", *SHORT)


# ------------------------------------------------------------------------------------------------------- disks


@contextmanager
def file_size_limit(size):
    """Let no file of this process grow beyond a size, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 1500, 5000])
def test_a_run_without_space_keeps_no_incomplete_file_and_the_same_command_continues(size, tiny, workdir, capsys):
    command = ["sample", "--checkpoint", tiny, *SHORT, "--output", "run"]
    with file_size_limit(size):
        assert exit_code(*command) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "--output" in message
    files = [path for path in (workdir / "run").rglob("*") if path.is_file()]
    assert [path.name for path in files if path.name != "run.json"] == []
    assert all(json.loads(path.read_text()) for path in files)
    assert exit_code(*command) == 0
    assert len(list((workdir / "run" / "images").iterdir())) == 2


def test_without_space_for_a_single_file_there_is_none(tiny, workdir, capsys):
    assert exit_code("sample", "--checkpoint", tiny, *SHORT, "--output", "run") == 0
    commands = [["export", "run", f"--{Path(file).stem}", file] for file in ("npz.npz", "grid.png", "images")]
    for command in [*commands, ["convert", tiny, "new.safetensors"]]:
        with file_size_limit(100):
            refusal(capsys, workdir, *command, names=command[-1:])


# ------------------------------------------------------------------------------------------------- permissions


@contextmanager
def permissions_of_nobody():
    """Give this process the permissions of another user."""
    codecs.lookup("ascii")  # Python's own files may be out of reach for it
    os.setresgid(65534, 65534, 0)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


@pytest.fixture(scope="module")
def foreign():
    """A folder that nobody else may write, with a network, a run of it, and files that nobody else may read."""
    if os.geteuid() != 0:
        pytest.skip("only root can take the permissions of another user: this test has checked nothing")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        network = write_grey_unet(folder / "tiny.safetensors")
        network.chmod(0o644)
        (folder / "secret.safetensors").write_bytes(network.read_bytes())
        (folder / "secret.yaml").write_text("seed: 1")
        for path in folder.glob("secret.*"):
            path.chmod(0o600)
        assert exit_code("sample", "--checkpoint", network, *SHORT, "--output", folder / "run") == 0
        yield folder


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["sample", *SHORT, "--checkpoint", "tiny.safetensors", "--output", "deep/new"], "--output"),
        (["sample", *SHORT, "--checkpoint", "tiny.safetensors", "--output", "run", "--num_samples", "3"], "--output"),
        (["sample", *SHORT, "--checkpoint", "secret.safetensors"], "--checkpoint"),
        (["sample", *SHORT, "--config", "secret.yaml"], "--config"),
        (["convert", "tiny.safetensors", "new.safetensors"], "new.safetensors"),
        (["convert", "secret.safetensors", "/tmp/new.safetensors"], "checkpoint"),
        (["export", "run", "--npz", "new.npz"], "--npz"),
        (["export", "run", "--grid", "new.png"], "--grid"),
        (["export", "run", "--images", "new"], "--images"),
    ],
    ids=arguments_id,
)
def test_a_missing_permission_is_reported(arguments, name, foreign, monkeypatch, capsys):
    monkeypatch.chdir(foreign)
    with permissions_of_nobody():
        refusal(capsys, foreign / "run", *arguments, names=[name])
    assert not (foreign / "deep").exists()


def test_a_run_that_may_not_be_written_is_recognised_as_complete(foreign, capsys):
    command = ["sample", "--checkpoint", foreign / "tiny.safetensors", *SHORT, "--output", foreign / "run"]
    with permissions_of_nobody():
        assert exit_code(*command) == 0
    assert "already contains" in capsys.readouterr().out
