"""Pages of the reference: help of all commands, settings of all classes, and the Python API."""

import re
from argparse import SUPPRESS, Action
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import getdoc
from pathlib import Path

from docstring_parser.attrdoc import AttributeDocstrings

import sagl
from sagl.commands.subcommands import SUBCOMMANDS
from sagl.configuration.parser import default_text
from sagl.configuration.sample import MODEL_GROUPS
from sagl.settings.guidance import TERM_OPTIONS, GuidanceSettings

PACKAGE = Path(sagl.__file__).parent
SETTINGS = ("sampling", "guidance", "network", "diffusion", "training", "evaluation", "tuning")
"""Modules of `sagl.settings` in the order of the page."""
PREFIXES = {cls.__name__: f"model.{group}." for group, cls in MODEL_GROUPS.items()}
PREFIXES |= {"DiffusionTrainingSettings": "model.", "ClassifierTrainingSettings": "model."}
PREFIXES |= {"DeviceSettings": "trainer.", "PreviewSettings": "preview.", "GuidanceSettings": "METHOD."}
"""Groups of the flags of settings classes; a guidance method has its own name for one, other classes have none."""
INTERFACE = ("commands", "configuration", "cli", "__main__")
"""Packages that the page of commands describes, not the API reference."""


def pages() -> dict[str, str]:
    """Return the Markdown text of each page by its path in the site."""
    api = {f"reference/api/{name}.md": api_page(name, modules) for name, modules in api_modules().items()}
    return {"reference/commands.md": commands_page(), "reference/settings.md": settings_page(), **api}


def commands_page() -> str:
    """Return the options of every command, which its --help prints too."""
    parts = ["# Commands\n`sagl COMMAND --help` prints the options of a command.\n"]
    for command, (module, text) in SUBCOMMANDS.items():
        parser = getattr(import_module(module), f"{command}_parser")()
        parts.append(f"## sagl {command}\n{text[0].upper()}{text[1:]}.\n")
        for group in parser._action_groups:
            rows = [option_row(action) for action in group._group_actions if is_shown(action)]
            heading = f"**{group.title[0].upper()}{group.title[1:]}**\n\n" if group.title else ""
            parts += [f"{heading}| option | default | meaning |\n|---|---|---|", *rows, ""] if rows else []
        parts += [f"```text\n{parser.epilog.strip()}\n```\n"] if parser.epilog else []
    return "\n".join(parts)


def is_shown(action: Action) -> bool:
    """Return whether an option is in the help."""
    return action.help != SUPPRESS and action.dest != "help" and not getattr(action, "is_repeated", False)


def option_row(action: Action) -> str:
    """Return the row of an option in the table of its group."""
    name = max(action.option_strings, key=len, default=action.dest)
    default = f"`{text}`" if (text := default_text(action)) else ""
    choices = f" `{action.metavar}`" if str(action.metavar).startswith("{") else ""
    return f"| `{name}` | {default} | {escape(action.help or '')}{choices} |"


# ----------------------------------------------------------------------------------------------------- settings


def settings_page() -> str:
    """Return a table for every settings class, from the docstrings of its fields, which are the help of the flags."""
    parts = [
        "# Settings\nEvery class of `sagl.settings` is a frozen dataclass that checks its values when it is built. The "
        "tables have the name of each setting as a flag of the commands or a key of a config; in Python it is the part "
        "after the last dot.\n"
    ]
    for module in SETTINGS:
        parts.append(f"## sagl.settings.{module}\n")
        for cls in vars(import_module(f"sagl.settings.{module}")).values():
            if isinstance(cls, type) and is_dataclass(cls) and cls.__module__ == f"sagl.settings.{module}":
                parts += [f"### {cls.__name__}\n{first_line(cls)}\n", *settings_table(cls), ""]
    return "\n".join(parts)


def settings_table(cls: type) -> Iterator[str]:
    """Yield the lines of the table of a settings class."""
    docs: dict[str, tuple[str, str | None, str | None]] = {}
    for base in reversed(cls.__mro__[:-1]):
        docs |= AttributeDocstrings().get_attr_docs(base)
    prefix = f"{cls.group}." if hasattr(cls, "group") else PREFIXES.get(cls.__name__, "")
    yield "| setting | type | default | meaning |\n|---|---|---|---|"
    for field in fields(cls):
        text, kind, default = docs[field.name]
        if field.name in TERM_OPTIONS and cls is not GuidanceSettings:
            continue
        default = re.sub(r"field\(default_factory=(?:lambda: )?(\w+)\)?.*", r"\1()", default or "required")
        yield f"| `{prefix}{field.name}` | `{kind}` | `{default}` | {escape(text)} |"
    if issubclass(cls, GuidanceSettings) and cls is not GuidanceSettings:
        names = ", ".join(f"`{name}`" for name in TERM_OPTIONS)
        yield f"| {names} | | | as in [GuidanceSettings](#guidancesettings) |"


def escape(text: str) -> str:
    """Write a docstring in one line, with the characters of Markdown that stand for themselves."""
    return re.sub(r"([|*_<\[\]])", r"\\\1", " ".join(text.split()))


def first_line(thing: object) -> str:
    """Return the first line of a docstring."""
    return (getdoc(thing) or "").split("\n")[0]


# ---------------------------------------------------------------------------------------------------------- API


def api_modules() -> dict[str, list[str]]:
    """Return the modules of each package, by the package's name."""
    packages: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        package = name.split(".")[1] if "." in name else ""
        if package and package not in INTERFACE and not (path.name == "__init__.py" or path.name.startswith("_")):
            packages.setdefault(f"sagl.{package}", []).append(name)
    return packages


def api_page(name: str, modules: list[str]) -> str:
    """Return the page of a package: the docstrings of all its modules."""
    return "\n".join([f"# {name}\n", *(f"::: {module}\n" for module in modules)])
