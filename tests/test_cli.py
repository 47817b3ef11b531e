import resource
import subprocess
import sys

import pytest

from sagl import cli
from sagl.errors import UserError
from tests.helpers.tiny import contents, exit_code, write_tiny

LOADED = "sys.exit(100 if {'torch', 'lightning', 'torchvision'} & sys.modules.keys() else code)"


def code_of_a_process(*arguments):
    """The exit code of a command in a process of its own; 100 where it has loaded torch."""
    program = f"import sys; from sagl.cli import main; code = main({list(arguments)!r}); {LOADED}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode


def test_help_loads_no_torch():
    assert code_of_a_process("--help") == 0


def test_a_command_line_is_refused_before_torch_loads():
    assert code_of_a_process("sample", "--num_samples", "0") == 2
    assert code_of_a_process("sample", "--nonsense", "1") == 2


def test_the_loading_of_torch_would_be_noticed():
    program = f"import sys, types; sys.modules['torch'] = types; code = 0; {LOADED}"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 100


@pytest.mark.parametrize(
    ("arguments", "code", "seconds"), [(["--help"], 0, 0.3), (["sample", "--sag.site", "output.99"], 2, 1.0)]
)
def test_help_and_refusals_are_quick(arguments, code, seconds, tmp_path):
    used = []
    for _ in range(3):  # processor time, the least of three: the machine may be busy
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        line = [sys.executable, "-m", "sagl.cli", *arguments]
        assert subprocess.run(line, cwd=tmp_path, capture_output=True, check=False).returncode == code
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(used) < seconds


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_verb(arguments, capsys):
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert [verb for verb in cli.VERBS if f"\n  {verb} " not in out] == []


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_of_its_own(verb, capsys):
    assert exit_code(verb, "--help") == 0
    assert f"usage: sagl {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["paint"], f"verb must be one of {', '.join(cli.VERBS)}, got 'paint'"),
        (["samlpe"], "Did you mean sample?"),
        (["--verbose"], "got '--verbose'"),
        (["sample", "--nonsense", "3"], "--nonsense"),
        (["sample", "stray"], "stray"),
        (["sample", "--num_samples", "many"], "`num_samples`"),
        (["sample", "--num_samples", "0"], "`num_samples` must be at least 1, got 0"),
        (["sample", "--batch_size", "-2"], "`batch_size` must be at least 1, got -2"),
        (["sample", "--first_id", "-1"], "`first_id` must be in 0 … "),
        (["sample", "--sampler", "euler"], "`sampler`"),
        (["sample", "--sampler", "ddpm", "--eta", "0.5"], "`eta` is for sampler ddim, got eta 0.5"),
        (["sample", "--labels", "shoes"], "`labels`"),
        (["sample", "--sag.interval", "[0.6, 0.2]"], "`sag.interval`"),
        (["sample", "--sag.interval", "0.5"], "`sag.interval`"),
        (["sample", "--sag.kernel_size", "4"], "`sag.kernel_size` must be odd and at least 1, got 4"),
        (["sample", "--sag.blur_sigma", "0"], "`sag.blur_sigma` must be above 0 pixels, got 0"),
        (["sample", "--sag.heads", "all"], "`sag.heads`"),
        (["sample", "--weights", "best"], "`weights`"),
        (["sample", "--checkpoint", "absent.safetensors"], "absent.safetensors"),
        (["sample", "--checkpoint", "."], "`checkpoint`"),
        (["evaluate"], "run"),
        (["evaluate", "absent"], "there is nothing at absent"),
        (["evaluate", "absent", "--format", "html"], "`format`"),
        (["evaluate", "absent", "--nonsense", "3"], "--nonsense"),
        (["convert", "absent.ckpt"], "target"),
        (["convert", "absent.ckpt", "new.safetensors"], "absent.ckpt"),
        (["convert", "absent.ckpt", "new.safetensors", "--dtype", "int8"], "`dtype`"),
    ],
)
def test_what_cannot_be_met_ends_in_one_line_that_names_it_and_writes_nothing(
    arguments, named, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith(f"sagl {arguments[0]}: ")
    assert named in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--sag.scale", "0.5", "--sag.site", "output.9"], "`site`"),
        (["--sag.scale", "0.5", "--sag.site", "middle", "--sag.kernel_size", "17"], "`sag.kernel_size`"),
        (["--respacing", "1001"], "`respacing`"),
        (["--respacing", "ddim400"], "`respacing`"),
        (["--labels", "3"], "`labels`"),
    ],
)
def test_what_the_network_cannot_do_is_refused_in_one_line_and_writes_nothing(flags, named, capsys, tmp_path):
    network = write_tiny(tmp_path / "tiny.safetensors")
    before = contents(tmp_path)
    assert exit_code("sample", "--checkpoint", network, "--output", tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert named in said
    assert contents(tmp_path) == before
    assert not (tmp_path / "run").exists()


def test_a_user_error_from_deep_inside_a_verb_is_one_line_and_exit_2(monkeypatch, capsys):
    def deep(_):
        raise UserError("`depth` must be 0,\n  got 3.")

    monkeypatch.setattr("sagl.commands.convert.main", lambda arguments: deep(arguments))
    assert cli.main(["convert"]) == 2
    assert capsys.readouterr().err == "sagl convert: `depth` must be 0, got 3.\n"


def test_a_run_that_is_stopped_by_hand_ends_in_one_line(monkeypatch, capsys):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sagl.commands.convert.main", stopped)
    assert cli.main(["convert"]) == 130
    assert capsys.readouterr().err.startswith("sagl convert: stopped. ")


@pytest.mark.parametrize("kind", [KeyError, ValueError, RuntimeError])
def test_any_other_exception_keeps_its_traceback(kind, monkeypatch, capsys):
    def deep(_):
        raise kind("a defect of ours")

    monkeypatch.setattr("sagl.commands.convert.main", lambda arguments: deep(arguments))
    with pytest.raises(kind) as error:
        cli.main(["convert"])
    assert error.traceback[-1].name == "deep"
    assert capsys.readouterr().err == ""


def test_the_arguments_of_the_process_are_taken_where_none_are_given(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sagl", "paint"])
    with pytest.raises(SystemExit) as end:
        cli.run()
    assert end.value.code == 2
    assert "'paint'" in capsys.readouterr().err
