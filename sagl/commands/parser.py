"""The parser of every verb: settings classes as flags, help of a screen or two, refusals of one line."""

import re
from argparse import SUPPRESS
from collections.abc import Iterable
from dataclasses import Field, fields
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from sagl.errors import UserError
from sagl.guidance.registry import GUIDANCES

KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text", "NoneType": "null"}
KINDS |= {"list": "a list like [a,b]"}
"""What a type is called in a message."""
FORMS = dict.fromkeys(
    (f"{name}.interval" for name in GUIDANCES),
    "two fractions like 0.5,1.0: from the noisiest step (0) to the cleanest (1)",
)
"""Settings whose form a type's name would not explain."""


class ShortHelp(DefaultHelpFormatter):
    """Two columns and the defaults; types only where the help does not say them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=118)  # type: ignore[no-untyped-call]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text  # an epilog has lines of its own

    def _get_type_str(self, action: Any) -> None:  # noqa: ANN401 (argparse's own)
        return None

    def _get_help_string(self, action: Any) -> str:  # noqa: ANN401
        text = super()._get_help_string(action)
        return re.sub(r" \(default: %\(default\)s\)$", "", text) if action.default in (None, False, "") else text


class UserErrorParser(ArgumentParser):
    """A parser that raises `UserError` in words of ours, and takes no abbreviations for flags."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one line.

        Raises:
            UserError: always.
        """
        raise UserError(format_error(message, self._settings())) from ex

    def _settings(self) -> list[str]:
        return [action.dest for action in self._actions if action.dest != "help" and action.help != SUPPRESS]


class Parser(UserErrorParser):
    """Parser of one verb."""

    def __init__(self, verb: str = "", description: str = "", epilog: str = "", **options: Any) -> None:  # noqa: ANN401
        """A parser without flags yet.

        Args:
            verb: the command's name.
            description: first line of its help.
            epilog: its last lines, as they are.
            options: further arguments, with which jsonargparse builds the parsers of nested classes.
        """
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        defaults = {"prog": f"sagl {verb}", "usage": f"sagl {verb} [options]", "formatter_class": ShortHelp}
        defaults |= {"description": description, "epilog": epilog, "exit_on_error": False, "allow_abbrev": False}
        super().__init__(**{**defaults, **options})

        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+|\.?inf|\.?nan)([eE][-+]?\d+)?$")

    @property
    def options(self) -> list[str]:
        """All flags that help shows."""
        return [option for option, action in self._option_string_actions.items() if action.help != SUPPRESS]

    def add_settings(self, kind: type, group: str | None = None) -> None:
        """The fields of a settings class as flags, under `--group.` where a group is named."""
        self.add_class_arguments(kind, group, as_group=True)
        if group:
            self._option_string_actions[f"--{group}"].help = SUPPRESS  # the whole group as a file: --config does that

    def parse(self, arguments: list[str]) -> Namespace:
        """Parse a command line.

        Raises:
            UserError: it is not one of this verb's.
        """
        return self.parse_args(parse_interval_arg(arguments))


def parse_interval_arg(arguments: Iterable[str]) -> list[str]:
    """Two numbers with a comma between them as a list: --sag.interval 0.5,1 -> --sag.interval [0.5,1]."""
    result: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.rpartition("=") if "=" in argument else ("", "", argument)
        name = (flag if equals else result[-1] if result else "").removeprefix("--")
        result.append(
            f"{flag}{equals}[{value}]" if name in FORMS and re.fullmatch(r"[^,\[]+,[^,]+", value) else argument
        )
    return result


def from_namespace(kind: type, given: Namespace, group: str = "") -> Any:  # noqa: ANN401 (a settings class -> its instance)
    """The settings class with the values that were parsed for it."""
    return kind(**{field.name: _value(field, given[field.name], group) for field in fields(kind)})


def _value(field: "Field[Any]", value: Any, group: str) -> Any:  # noqa: ANN401
    """A parsed value; whole numbers become floats where those are asked for, and null only where it may be.

    Raises:
        UserError: null, or a number too large, for another kind of setting.
    """
    kind, name = str(getattr(field.type, "__name__", field.type)), f"{group}{field.name}"
    if value is None and "None" not in str(field.type):
        raise UserError(f"`{name}` must be {FORMS.get(name) or KINDS.get(kind, 'given')}, got null.")
    try:
        return float(value) if kind == "float" and isinstance(value, int) else value
    except OverflowError as error:
        raise UserError(f"`{name}` must be a number that fits, got one of {value.bit_length()} bits.") from error


def field_names(kind: type) -> list[str]:
    """Names of a settings class's fields."""
    return [field.name for field in fields(kind)]


def suggest(name: str, known: Iterable[str]) -> str:
    """A suggestion, " Did you mean …?", or nothing where no name is near."""
    known = list(known)
    short = {full.rsplit(".", 1)[-1]: full for full in known}
    close = get_close_matches(name, known, n=1, cutoff=0.6) or [
        short[found] for found in get_close_matches(name.rsplit(".", 1)[-1], short, n=1, cutoff=0.7)
    ]
    return f" Did you mean {close[0]}?" if close else ""


def format_error(message: str, settings: list[str]) -> str:
    """The parser's message in one line of ours: the setting, what is allowed, what came."""
    line = " ".join(message.split())
    if found := re.search(
        r"Parser key \"(.+?)\": .* Subtypes: \[<class 'sagl\.settings\..+? Errors: - (.+?) - Expected", line
    ):
        return f"{found[1]}: {found[2]}"
    if found := re.search(r"NestedArg\(key='(.+?)'", line):
        return f"there is no option with {found[1]!r} on the command line: a --config can have it. --help lists all."
    if re.search(r"unrecognized arguments:$", line):
        return "there is an empty word on the command line. --help lists all options."
    if found := re.search(r"unrecognized arguments: (\S+)", line):
        flag = found[1].split("=")[0]
        suggestion = suggest(flag.lstrip("-"), settings).replace("Did you mean ", "Did you mean --")
        return f"there is no option {flag!r}.{suggestion} --help lists all."
    if found := re.search(r"Group '(.+?)' does not accept option '(.+?)'", line):
        return _unknown(f"{found[1]}.{found[2]}", settings)
    if found := re.search(r"Option '(.+?)' is not accepted", line):
        return _unknown(found[1], settings)
    if found := re.search(r'Parser key "(.+?)": (.+?)\.? Got value:\s?(.*)$', line):
        return f"`{found[1]}` must be {_allowed(found[1], found[2])}, got {found[3] or 'nothing'}."
    if found := re.search(
        r'Parser key "(.+?)": Does not validate .*? Subtypes: \[(.+?)\] .*Given value:\s?(.*)$', line
    ):
        return f"`{found[1]}` must be {_allowed(found[1], found[2])}, got {found[3] or 'nothing'}."
    if found := re.search(r"argument (\S+): ignored explicit argument (.+)$", line):
        return f"{found[1]} takes no value, got {found[2]}."
    if found := re.search(r'Parser key "(.+?)": Unable to load config (.+?)(?: |$)', line):
        return f"there is no option '--{found[1]}'. --config reads a file; --help lists all."
    if found := re.search(r"arguments are required: (.+)$", line):
        hint = " A --config has them: lsun_cat, or a .yaml file of yours." if "data" in found[1] else ""
        return f"{found[1]} must be given.{hint} --help lists all options."
    if found := re.search(r"argument (\S+): expected one argument", line):
        return f"{found[1]} needs a value. --help says which."
    return line


def _unknown(name: str, settings: list[str]) -> str:
    return f"there is no setting {name!r}.{suggest(name, settings)}"


def _allowed(name: str, expected: str) -> str:
    if name in FORMS:
        return FORMS[name]
    if choices := re.search(r"Literal\[(.+?)\]", expected):
        return "one of " + ", ".join(choice.strip(" '\"") for choice in choices[1].split(","))
    kinds = [KINDS[kind] for kind in re.findall(r"'(\w+)'", expected) if kind in KINDS]
    return " or ".join(dict.fromkeys(kinds)) or expected
