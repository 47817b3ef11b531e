import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sagl import cli
from sagl.cli import SUBCOMMANDS, with_flags
from sagl.configuration.parser import Parser
from sagl.errors import UserError
from sagl.utils.launchers import PARENT
from sagl.utils.signals import STOP_SIGNALS
from tests.helpers.commands import exit_code

EXIT_100_WITH_TORCH = "sys.exit(100 if {'torch', 'lightning', 'torchvision'} & sys.modules.keys() else code)"


def exit_code_of_process(*arguments):
    """Return the exit code of a command in a new process, 100 if it has imported torch."""
    program = f"import sys; from sagl.cli import main; code = main({list(arguments)!r}); {EXIT_100_WITH_TORCH}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["fit", "--help"], 0),
        (["sample", "--num_samples", "0"], 2),
        (["sample", "--nonsense", "1"], 2),
    ],
)
def test_help_and_refused_command_lines_need_no_torch(arguments, code):
    assert exit_code_of_process(*arguments) == code


def test_an_import_of_torch_is_detected():
    program = f"import sys, types; sys.modules['torch'] = types; code = 0; {EXIT_100_WITH_TORCH}"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 100


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_subcommand(arguments, capsys):
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert [command for command in SUBCOMMANDS if f"\n  {command} " not in text] == []


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_every_subcommand_has_its_own_help(command, capsys):
    assert exit_code(command, "--help") == 0
    assert f"usage: sagl {command}" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "hint"), [("samlpe", "Did you mean sample?"), ("zebra", ""), ("--verbose", "")])
def test_an_unknown_subcommand_is_refused_with_a_similar_one(command, hint, capsys):
    assert cli.main([command]) == 2
    message = capsys.readouterr().err
    assert repr(command) in message
    assert hint in message
    assert message.count("\n") == 1


def test_a_user_error_is_one_line_with_exit_code_2_and_names_flags(monkeypatch, capsys):
    def refuse(arguments):
        raise UserError("`num_samples` must be 0,\n  got 3.")

    monkeypatch.setattr("sagl.commands.sample.main", refuse)
    assert cli.main(["sample"]) == 2
    assert capsys.readouterr().err == "sagl sample: --num_samples must be 0, got 3.\n"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("`sag.scale` must be finite.", "--sag.scale must be finite."),
        ("Set `scale` or `run`.", "Set --scale or `run`."),
        ("`model.network` and scale stay.", "`model.network` and scale stay."),
    ],
)
def test_parameter_names_become_flags_only_if_the_command_has_them(message, expected):
    def hat_parser():
        p = Parser("hat", "Try hats.")
        p.add_argument("run", type=str)
        p.add_argument("--scale", type=float, default=0.0)
        p.add_argument("--sag.scale", type=float, default=0.0)
        return p

    assert with_flags(message, "hat", SimpleNamespace(hat_parser=hat_parser)) == expected


@pytest.mark.parametrize("command", ["convert", "fit"])
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_a_command_in_one_line_with_a_code_of_its_own(number, command, monkeypatch, capsys):
    monkeypatch.setattr(f"sagl.commands.{command}.main", lambda arguments: signal.raise_signal(number))
    code = 0 if (command, number) == ("fit", signal.SIGTERM) else 128 + number
    assert cli.main([command]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_rank_above_0_ends_silently_and_without_failure(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(PARENT, str(os.getppid()))
    monkeypatch.setattr("sagl.commands.convert.main", lambda arguments: signal.raise_signal(signal.SIGINT))
    assert cli.main(["convert"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("target", ["closed pipe", "/dev/full"])
def test_a_command_whose_text_cannot_be_written_ends_well(target):
    reader, writer = os.pipe()
    os.close(reader)
    output = writer if target == "closed pipe" else os.open(target, os.O_WRONLY)
    program = "from sagl import cli; cli.run()"
    command = [sys.executable, "-c", program, "sample", "--help"]
    process = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, b"")


def test_a_line_is_in_a_log_before_the_command_ends(tmp_path):
    end = "print('first line'); os.kill(os.getpid(), signal.SIGKILL)"
    program = f"import os, signal; from sagl import cli; cli.main = lambda: exec({end!r}); cli.run()"
    with (tmp_path / "log").open("wb") as log:
        subprocess.run([sys.executable, "-c", program], stdout=log, check=False)
    assert (tmp_path / "log").read_text() == "first line\n"


def test_an_error_of_the_file_system_is_one_line_with_the_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sagl.commands.convert.main", lambda arguments: (tmp_path / "absent").read_bytes())
    assert cli.main(["convert"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sagl convert: ")
    assert str(tmp_path / "absent") in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_characters_that_the_output_cannot_encode_are_replaced(encoding):
    command = [sys.executable, "-m", "sagl.cli", "sample", "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"--num_samples" in result.stdout


@pytest.mark.parametrize("exception", [KeyError, ValueError, RuntimeError])
def test_any_other_exception_keeps_its_traceback(exception, monkeypatch, capsys):
    def fail(arguments):
        raise exception("defect")

    monkeypatch.setattr("sagl.commands.convert.main", fail)
    with pytest.raises(exception) as error:
        cli.main(["convert"])
    assert error.traceback[-1].name == "fail"
    assert capsys.readouterr().err == ""


def test_the_entry_point_uses_the_arguments_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sagl", "zebra"])
    with pytest.raises(SystemExit) as end:
        cli.run()
    assert end.value.code == 2
    assert "'zebra'" in capsys.readouterr().err
