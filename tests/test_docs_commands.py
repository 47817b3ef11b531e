"""Every command of the documentation is valid for its real parser, and the imports of every Python block resolve."""

import ast
import re
import shlex
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from sagl.commands.compare import FLAGS_WITHOUT_VALUE
from sagl.commands.subcommands import SUBCOMMANDS
from sagl.configuration.parser import from_namespace, parse_interval_arg, positionals_first
from sagl.configuration.training import put_configs_first, rename_network_flags, training_kind, training_parser
from sagl.errors import UserError
from sagl.guidance.registry import GUIDANCES
from sagl.settings.sampling import RunSettings, SamplerSettings

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
ADDED_BY_THE_PAGE = ("--icg.scale", "--sampler plms")
"""Flags and values of the methods that docs/extending.md adds; tests/test_extending.py runs these commands."""


def commands(page):
    """Yield the complete commands of a page, in blocks and in the text, without `sagl`."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"```(?:bash)?\n(.*?)```", text, flags=re.S)).replace("\\\n", " ")
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for line in (*blocks.splitlines(), *inline):
        match = re.match(r"(?:(?:srun|torchrun)\b.*? )?(?:sagl|-m sagl\.cli|sagl\.cli) (.*)", line.strip())
        is_usage = match and re.search(r"…|\[-|[A-Z]+ \[|\bCOMMAND\b|_OR_", match[1])  # the form of a command, not one
        if match and not is_usage and not any(flag in line for flag in ADDED_BY_THE_PAGE):
            yield match[1]


@cache
def parser_of(subcommand, **options):
    """Return the parser of a subcommand; it takes seconds to build those of trainings."""
    if subcommand in ("fit", "validate", "test"):
        return training_parser(subcommand, **options)
    return getattr(import_module(SUBCOMMANDS[subcommand][0]), f"{subcommand}_parser")()


def parse(command):
    """Parse a command as it would be, and check the values of settings; open no file but configs."""
    subcommand, *arguments = shlex.split(command, comments=True)
    if not arguments or "--help" in arguments or "--help_all" in arguments:
        assert subcommand in SUBCOMMANDS
    elif subcommand in ("fit", "validate", "test"):
        arguments = parse_interval_arg(rename_network_flags(put_configs_first(arguments)))
        has_config = "--config" in arguments
        arguments += [] if has_config or "--model.network" in arguments else ["--model.network", "emoji"]  # of a run
        parser_of(subcommand, kind=training_kind(arguments), full=has_config).parse(arguments)
    else:
        parser = parser_of(subcommand)
        if subcommand == "compare":
            arguments = positionals_first(arguments, FLAGS_WITHOUT_VALUE)
        flags = parser.parse(arguments)
        if subcommand in ("sample", "tune", "analyze"):
            from_namespace(RunSettings, flags)
            from_namespace(SamplerSettings, flags)
            for name, entry in GUIDANCES.items():
                from_namespace(entry.settings_class, flags[name], f"{name}.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_valid(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    errors = []
    for command in dict.fromkeys(commands(page)):
        try:
            parse(command)
        except (UserError, KeyError, AssertionError) as error:
            errors.append((command, str(error)))
    assert errors == []


@pytest.mark.parametrize(
    "command", ["sample --sag.scal 1", "sample --respacing 0 --sampler dim", "fit --config emoji --data.rot a"]
)
def test_an_invalid_command_would_be_found(command):
    with pytest.raises(UserError):
        parse(command)


def test_most_pages_have_commands():
    assert sum(len(list(commands(page))) for page in PAGES) > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_scripts_exist(page):
    scripts = set(re.findall(r"\bpython (\w\S*\.py)", page.read_text()))
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_compile_and_their_imports_resolve(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})
