"""Parsers of the commands: settings classes as flags, a short help, and errors of one line."""

import re
from argparse import SUPPRESS, Action
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from traceback import walk_tb
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from sagl.errors import UserError, require, suggest
from sagl.utils.files import expand_paths

TYPE_NAMES = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list": "a list like [a,b]",
    "tuple": "a list like [1,2,4]",
}
"""Types as error messages call them."""
INTERVAL_HINT = "two fractions like 0.5,1.0: from the noisiest step (0) to the cleanest (1)"


class ShortHelpFormatter(DefaultHelpFormatter):
    """Help in two columns with defaults; types are left out, because the help texts name them where needed."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=118)  # type: ignore[no-untyped-call]

    def add_argument(self, action: Any) -> None:  # noqa: ANN401 (argparse's own)
        if not getattr(action, "is_repeated", False):
            super().add_argument(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text  # an epilog is formatted already

    def _get_type_str(self, action: Any) -> None:  # noqa: ANN401 (argparse's own)
        return None

    def _get_help_string(self, action: Any) -> str:  # noqa: ANN401
        text, default = super()._get_help_string(action), default_text(action)
        return text.replace(" (default: %(default)s)", f" (default: {default})" if default else "")

    def _format_usage(self, usage: str | None, actions: Iterable[Action], *args: Any) -> str:  # noqa: ANN401
        names = [positional_usage(action) for action in actions if not action.option_strings]
        return super()._format_usage(" ".join([self._prog, *names, "[options]"]), [], *args)


def default_text(action: Action) -> str:
    """Return the default of an option in the form of its flag; empty for null, "", () and options without a value."""
    if action.nargs == 0 or action.default in (None, "", (), [], SUPPRESS):
        return ""
    return str(action.default).lower() if isinstance(action.default, bool) else str(action.default)


def positional_usage(action: Action) -> str:
    """Return a positional argument in the form of a line of usage: RUN, [RUN] or RUN [RUN …].

    One that the command itself requires, as its help says, has nargs "?" and no brackets.
    """
    name = str(action.metavar or action.dest.upper())
    if (action.help or "").endswith("(required)"):
        return name
    return {"?": f"[{name}]", "+": f"{name} [{name} …]"}.get(str(action.nargs), name)


class Parser(ArgumentParser):
    """Parser of one command. It raises `UserError` with a message of one line.

    Args:
        command: name of the command.
        description: first line of the help.
        epilog: last lines of the help, as they are.
        options: further arguments, with which jsonargparse builds the parsers of nested classes.
    """

    def __init__(self, command: str = "", description: str = "", epilog: str = "", **options: Any) -> None:  # noqa: ANN401
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        defaults = {"prog": f"sagl {command}".strip(), "formatter_class": ShortHelpFormatter}
        defaults |= {"description": description, "epilog": epilog, "exit_on_error": False, "allow_abbrev": False}
        super().__init__(**{**defaults, **options})
        # argparse takes -1e3, -inf and -nan for options otherwise
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+|\.?inf|\.?nan)([eE][-+]?\d+)?$")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError` in place of jsonargparse's message."""
        names = [action.dest for action in self._actions if action.dest != "help" and action.help != SUPPRESS]
        raise UserError(format_error(message, names)) from ex

    def instantiate(self, *args: Any, **kwargs: Any) -> Namespace:  # noqa: ANN401 (as the overridden method)
        """Build the objects of parsed settings.

        Raises:
            UserError: a settings class refuses a value. Of a setting with several types, jsonargparse raises a
                `ValueError` that has the refusal in its text.
        """
        try:
            result: Namespace = super().instantiate(*args, **kwargs)
        except UserError:
            raise
        except ValueError as error:
            self.error(str(error), error)
        return result

    def parse_object(self, *args: Any, **kwargs: Any) -> Namespace:  # noqa: ANN401 (as the overridden method)
        with float_errors():
            result: Namespace = super().parse_object(*args, **kwargs)
        return result

    @property
    def options(self) -> list[str]:
        """Flags that the help shows."""
        return [option for option, action in self._option_string_actions.items() if action.help != SUPPRESS]

    @property
    def help_texts(self) -> dict[str, str]:
        """Help texts of the flags by name."""
        return {name.removeprefix("--"): action.help or "" for name, action in self._option_string_actions.items()}

    def with_flags(self, message: str) -> str:
        """Replace names of parameters in backticks by flags: `sag.scale` -> --sag.scale. Other names remain."""
        flags = self.options
        return re.sub(r"`([\w.]+)`", lambda match: f"--{match[1]}" if f"--{match[1]}" in flags else match[0], message)

    def add_settings(self, cls: type, group: str | None = None, repeated: Iterable[str] = ()) -> None:
        """Add the fields of a settings class as flags, as `--group.field` if a group is given.

        The help omits the fields of `repeated`, which it has for another group.
        """
        self.add_class_arguments(cls, group, as_group=True)
        for name in repeated:
            setattr(self._option_string_actions[f"--{group}.{name}"], "is_repeated", True)  # noqa: B010 (no field of it)
        if group:
            self._option_string_actions[f"--{group}"].help = SUPPRESS  # would read the group from a file, as --config

    def parse(self, arguments: list[str]) -> Namespace:
        """Parse a command line, and expand ~ and $NAME in all values.

        Raises:
            UserError: an option is unknown, a value has the wrong type, or a variable of a path is not set.
        """
        with float_errors():
            values = self.parse_args(parse_interval_arg(arguments))
        defaults = {action.dest: action.default for action in self._actions}
        for name, value in values.items():
            is_unset = value == "" and "." not in name and defaults.get(name) != ""  # "$VARIABLE" that has no value
            require(not is_unset, f"`{name}` must not be empty.")
            if isinstance(value, str | list | dict):
                values[name] = expand_paths(value, name.replace(".init_args", ""))
        return values


@contextmanager
def float_errors() -> Iterator[None]:
    """Convert the error of jsonargparse about an integer that no float can hold to a `UserError`."""
    try:
        yield
    except OverflowError as error:
        settings = (frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__))
        name = next((setting.dest for setting in settings if isinstance(setting, Action)), "config")
        raise UserError(f"`{name}` must fit a float, got an integer of more than 300 digits.") from error


def positionals_first(arguments: Sequence[str], flags_without_value: Container[str]) -> list[str]:
    """Move the arguments that are neither flags nor values of flags to the front, as argparse needs them.

    Args:
        arguments: the command line.
        flags_without_value: flags that take no value, such as --overwrite.
    """
    positionals, others = list[str](), list[str]()
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        is_value = previous.startswith("--") and "=" not in previous and previous not in flags_without_value
        (others if argument.startswith("-") or is_value else positionals).append(argument)
    return positionals + others


def parse_interval_arg(arguments: Iterable[str]) -> list[str]:
    """Put intervals into brackets: --sag.interval 0.5,1 -> --sag.interval [0.5,1]."""
    result: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.rpartition("=") if "=" in argument else ("", "", argument)
        name = flag or (result[-1] if result else "")
        is_interval = re.fullmatch(r"--\w+\.interval", name) and re.fullmatch(r"[^,\[]+,[^,]+", value)
        result.append(f"{flag}{equals}[{value}]" if is_interval else argument)
    return result


def from_namespace(cls: type, values: Namespace, group: str = "") -> Any:  # noqa: ANN401 (an instance of cls)
    """Build a settings object from parsed values; `group` with its dot is the prefix of the names in errors."""
    return cls(**{field.name: _convert(field, values[field.name], group) for field in fields(cls)})


def _convert(field: "Field[Any]", value: Any, group: str) -> Any:  # noqa: ANN401
    """Convert integers to floats where the field is one or null, and refuse null where the field does not allow it."""
    type_name, name = str(getattr(field.type, "__name__", field.type)), f"{group}{field.name}"
    if value is None and "None" not in str(field.type):
        raise UserError(f"`{name}` must be {_allowed(name, repr(type_name))}, got null.")
    try:
        return float(value) if "float" in str(field.type) and isinstance(value, int) else value
    except OverflowError as error:
        raise UserError(f"`{name}` must fit a float, got an integer of {value.bit_length()} bits.") from error


def field_names(cls: type) -> list[str]:
    """Return the names of a settings class's fields."""
    return [field.name for field in fields(cls)]


# --------------------------------------------------------------------------------------------- error messages


def format_error(message: str, names: list[str]) -> str:
    """Rewrite a message of argparse or jsonargparse, which have no structured errors, as one line for users.

    Args:
        message: the message.
        names: names of all settings, for suggestions.
    """
    line = " ".join(message.split())
    for pattern, rewrite in _REWRITES.items():
        if match := re.search(pattern, line):
            return rewrite(names, *match.groups())
    return line


def _unknown_option(names: list[str], argument: str) -> str:
    flag = argument.split("=")[0]
    hint = suggest(flag.lstrip("-"), names).replace(" mean ", " mean --")
    return f"there is no option {flag!r}.{hint} --help lists all."


def _unknown_setting(names: list[str], *parts: str) -> str:
    name = ".".join(parts)
    return f"there is no setting {name!r}.{suggest(name, names)}"


def _wrong_type(names: list[str], name: str, expected: str, value: str) -> str:
    return f"`{name}` must be {_allowed(name, expected)}, got {value or 'nothing'}."


def _missing_options(names: list[str], missing: str) -> str:
    hint = " A --config has them: lsun_cat, or a .yaml file of yours." if "data" in missing else ""
    return f"{missing} must be given.{hint} --help lists all options."


def _unknown_class_setting(names: list[str], group: str, name: str, hint: str) -> str:
    """Rewrite the message about a flag that the class of a group, such as --data, has no setting for."""
    return f"there is no option '--{group}.{name}'.{hint.replace(' mean ', f' mean --{group}.')}"


def _no_class(names: list[str], group: str, name: str, error: str) -> str:
    hint = " Is its folder in PYTHONPATH?" if error.startswith("No module named") else ""
    return f"`{group}` must be a class that can be imported, got {name}: {error}.{hint}"


def _allowed(name: str, expected: str) -> str:
    """Describe the allowed values from the expected types in jsonargparse's message."""
    if name.endswith(".interval"):
        return INTERVAL_HINT
    if literals := re.findall(r"Literal\[(.+?)\]", expected):
        choices = (choice.strip(" '\"") for literal in literals for choice in literal.split(","))
        return "one of " + ", ".join(dict.fromkeys(choices))
    types = [TYPE_NAMES[word] for word in re.findall(r"'(\w+)'", expected) if word in TYPE_NAMES]
    return " or ".join(dict.fromkeys(types)) or expected.removeprefix("Expected ").replace("tuple", "list")


_REWRITES: dict[str, Callable[..., str]] = {
    r"Parser key \"(.+?)\": .* Subtypes: \[<class 'sagl\.settings\..+? Errors: - (.+?) - Expected": (
        lambda names, name, error: f"{name}: {error}"
    ),
    r"Does not validate .*? Subtypes: \[<class 'sagl\.settings\..+? Errors: - (.+?) - Expected": lambda names, error: (
        error
    ),
    r"Parser key \"(.+?)\": .* Errors: - (`.+?) - Expected .*NestedArg": lambda names, name, error: f"{name}: {error}",
    r"Parser key \"(.+?)\": .* Errors: - Problem with given class_path '(.+?)': (.+?) - Expected": _no_class,
    r"Parser key \"(.+?)\": .* Errors: - ([\w, ]+) must be given\. ": (
        lambda names, group, missing: (
            " and ".join(f"--{group}.{name}" for name in missing.split(", "))
            + " must be given. --help lists all options."
        )
    ),
    r"Parser key \"(.+?)\": .* Errors: - there is no setting '(\w+)'\.(.*?) - Expected .*NestedArg": (
        _unknown_class_setting
    ),
    r"NestedArg\(key='(.+?)'": (
        lambda names, name: f"there is no option with {name!r} on the command line: a --config can have it."
    ),
    r"unrecognized arguments:$": lambda names: "there is an empty argument. --help lists all options.",
    r"unrecognized arguments: (\S+)": _unknown_option,
    r"Group '(.+?)' does not accept option '(.+?)'": _unknown_setting,
    r"Option '(.+?)' is not accepted": _unknown_setting,
    r'Parser key "(.+?)": Exceeds the limit': lambda names, name: f"`{name}` must have at most 4300 digits.",
    r'Parser key "(.+?)": (.+?)\.? Got value:\s?(.*)$': _wrong_type,
    r'Parser key "(.+?)": Does not validate .*? Subtypes: \[(.+?)\] .*Given value:\s?(.*)$': _wrong_type,
    r"argument (\S+): ignored explicit argument (.+)$": (
        lambda names, flag, value: f"{flag} takes no value, got {value}."
    ),
    r'Parser key "(.+?)": Unable to load config (?:.+?)(?: |$)': (
        lambda names, name: f"there is no option '--{name}'. --config reads a file; --help lists all."
    ),
    r"arguments are required: (.+)$": _missing_options,
    r"argument (\S+): expected one argument": lambda names, flag: f"{flag} needs a value. --help says which.",
}
"""Patterns of messages -> a function of the settings' names and the pattern's groups."""
