import re
import subprocess
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import get_args

import pytest

from sagl.commands.completion import completion_script, main
from sagl.commands.subcommands import SUBCOMMANDS
from sagl.errors import UserError
from sagl.guidance.registry import GUIDANCES
from sagl.settings.guidance import TERM_OPTIONS
from tests.helpers.commands import exit_code


@pytest.fixture(scope="module")
def complete():
    """Return what bash offers for the last of some words."""
    script = [completion_script("bash"), 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_TYPE=9; _shtab_sagl']
    script += ["printf '%s\\n' \"${COMPREPLY[@]}\""]

    def complete(*words, cwd="/"):
        command = ["bash", "--norc", "-s", "--", "sagl", *words]  # the script is too long for an argument
        result = subprocess.run(
            command, input="\n".join(script), cwd=cwd, capture_output=True, text=True, check=True, timeout=60
        )
        return [line for line in result.stdout.splitlines() if line]

    return complete


def test_the_first_word_is_a_subcommand(complete):
    assert complete("") == list(SUBCOMMANDS)
    assert complete("e") == ["evaluate", "export"]


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_the_options_of_its_help_are_completed_and_the_settings_of_what_may_also_be_a_name(command, complete):
    parser = getattr(import_module(SUBCOMMANDS[command][0]), f"{command}_parser")()
    options = set(re.findall(r"^  (?:-h, )?(--[\w.]+)", parser.format_help().split("further groups")[0], re.M))
    for action in parser._actions:  # --model.network is the name of a network, and --model.network.num_channels a field
        kinds = () if action.dest.endswith(".help") else get_args(getattr(action, "_typehint", None))
        for kind in filter(is_dataclass, kinds):
            options |= {f"--{action.dest}.{field.name}" for field in fields(kind)}
    repeated = {f"--{name}.{option}" for name in list(GUIDANCES)[1:] for option in TERM_OPTIONS}  # help has them once
    assert set(complete(command, "--")) - repeated == options


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("sample", "--sag.h"), ["--sag.head", "--sag.heads"]),
        (("sample", "--seed", "3", "--sag.th"), ["--sag.threshold"]),
        (("sample", "--sampler", "dd"), ["ddpm", "ddim"]),
        (("convert", "--dtype", "b"), ["bfloat16"]),
        (("completion", "z"), ["zsh"]),
    ],
)
def test_options_and_their_choices_are_completed(words, expected, complete):
    assert complete(*words) == expected


@pytest.mark.parametrize("words", [("evaluate",), ("export",), ("compare",), ("sample", "--checkpoint")])
def test_paths_are_completed(words, complete, tmp_path):
    for name in ("run a", "run_b", "other"):
        (tmp_path / name).mkdir()
    assert sorted(complete(*words, "ru", cwd=tmp_path)) == ["run a", "run_b"]


def test_the_script_of_each_shell_registers_a_function(capsys):
    assert exit_code("completion", "bash") == 0
    program = capsys.readouterr().out + "\ncomplete -p sagl"
    result = subprocess.run(["bash", "--norc", "-s"], input=program, capture_output=True, text=True)
    assert "-F _shtab_sagl sagl" in result.stdout
    assert exit_code("completion", "zsh") == 0
    assert "#compdef sagl" in capsys.readouterr().out


def test_another_shell_is_refused():
    with pytest.raises(UserError, match=r"`shell` .*fish"):
        main(["fish"])
