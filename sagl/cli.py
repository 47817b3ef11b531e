"""The `sagl` command: a table of subcommands, whose modules are imported when they run."""

import re
import sys
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType

from sagl.commands.subcommands import SUBCOMMANDS
from sagl.errors import UserError
from sagl.utils.environment import choose_thread_waiting


def usage() -> str:
    """Return the text of `sagl --help`."""
    lines = [f"  {command:<12}{text}" for command, (_, text) in SUBCOMMANDS.items()]
    return "\n".join(["usage: sagl COMMAND [options]", "", *lines, "", "sagl COMMAND --help shows its options."])


def main(arguments: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: without the program's name; None stands for those of the process.

    Returns:
        The exit code: 0; 2 after a `UserError`, whose message is printed as one line; 130 after an interrupt.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, *rest = arguments
    if command not in SUBCOMMANDS:
        similar = get_close_matches(command, SUBCOMMANDS, n=1)
        hint = f" Did you mean {similar[0]}?" if similar else ""
        print_error(command, f"the command must be one of {', '.join(SUBCOMMANDS)}, got {command!r}.{hint}")
        return 2
    choose_thread_waiting()
    module = import_module(SUBCOMMANDS[command][0])
    try:
        module.main(rest)
    except UserError as error:
        print_error(command, with_flags(str(error), command, module))
        return 2
    except KeyboardInterrupt:
        print_error(command, "interrupted. All files are intact, and the same command continues from them.")
        return 130
    return 0


def with_flags(message: str, command: str, module: ModuleType) -> str:
    """Replace names of parameters in backticks by their flags: `sag.scale` -> --sag.scale. Other names remain."""
    make_parser = getattr(module, f"{command}_parser", None)
    flags = make_parser().options if make_parser else []
    return re.sub(r"`([\w.]+)`", lambda match: f"--{match[1]}" if f"--{match[1]}" in flags else match[0], message)


def print_error(command: str, message: str) -> None:
    """Print a message as one line on stderr."""
    print(f"sagl {command}: {' '.join(message.split())}", file=sys.stderr)


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
