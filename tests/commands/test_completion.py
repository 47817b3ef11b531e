import re
import subprocess
from importlib import import_module

import pytest

from sagl.commands.completion import PARSERS, main, script
from sagl.commands.verbs import VERBS
from sagl.errors import UserError


def completed(*words, cwd="/"):
    """What bash would offer for the last of these words."""
    lines = [script(), 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _sagl', "printf '%s\\n' \"${COMPREPLY[@]}\""]
    command = ["bash", "--norc", "-uc", "\n".join(lines), "bash", "sagl", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


def test_the_first_word_is_a_verb():
    assert completed("") == list(VERBS)
    assert completed("e") == ["evaluate", "export"]
    assert completed("nothing") == []


def test_every_verb_that_has_flags_has_them_completed():
    assert set(VERBS) - set(PARSERS) == {"doctor", "completion"}


@pytest.mark.parametrize("verb", PARSERS)
def test_the_flags_of_a_verb_are_those_that_its_help_lists(verb):
    module, function = PARSERS[verb]
    said = getattr(import_module(module), function)().format_help().split("groups with more flags")[0]
    listed = re.findall(r"^  (?:-h, )?(--[\w.]+)", said, re.M)
    assert sorted(completed(verb, "--")) == sorted(listed)


def test_a_begun_flag_is_completed_wherever_it_stands():
    assert completed("sample", "--sag.s") == ["--sag.scale", "--sag.site"]
    assert completed("sample", "--seed", "3", "--sag.th") == ["--sag.threshold"]
    assert completed("completion", "z") == ["zsh"]
    assert completed("doctor", "--") == ["--help"]


@pytest.mark.parametrize("before", [("evaluate",), ("export",), ("sample", "--checkpoint"), ("fit", "--config")])
def test_where_no_flag_fits_file_names_are_completed(before, tmp_path):
    for name in ("run_a", "run_b", "other"):
        (tmp_path / name).mkdir()
    assert sorted(completed(*before, "ru", cwd=tmp_path)) == ["run_a", "run_b"]
    assert completed(*before, "none", cwd=tmp_path) == []


@pytest.mark.parametrize(("begun", "want"), [("my", ["my run", "my_run"]), ("a", ["a*", "abc"])])
def test_a_file_name_with_a_space_or_a_star_is_one_name(begun, want, tmp_path):
    for name in ("my run", "my_run", "run", "a*", "abc"):
        (tmp_path / name).touch()
    assert sorted(completed("evaluate", begun, cwd=tmp_path)) == want


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_what_is_printed_registers_the_function_for_sagl(shell, capsys):
    main([shell])
    printed = capsys.readouterr().out
    assert printed.startswith("autoload -U +X bashcompinit && bashcompinit\n") == (shell == "zsh")
    program = printed.removeprefix("autoload -U +X bashcompinit && bashcompinit\n") + "complete -p sagl"
    said = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.split()[-3:] == ["-F", "_sagl", "sagl"]


def test_another_shell_is_refused():
    with pytest.raises(UserError, match="`shell` must be one of bash, zsh, got fish"):
        main(["fish"])
