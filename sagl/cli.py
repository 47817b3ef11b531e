"""The `sagl` command: a table of subcommands, whose modules are imported when they run."""

import os
import signal
import sys
from importlib import import_module
from io import TextIOWrapper
from types import ModuleType

from sagl.commands.subcommands import SUBCOMMANDS
from sagl.errors import UserError, suggest
from sagl.utils.distributed import global_rank
from sagl.utils.environment import choose_thread_waiting, disable_malloc_trim
from sagl.utils.launchers import ignore_stale_ranks
from sagl.utils.signals import Interrupted, on_stop_signal, raise_interrupted


def usage() -> str:
    """Return the text of `sagl --help`."""
    lines = [f"  {command:<12}{text}" for command, (_, text) in SUBCOMMANDS.items()]
    return "\n".join(["usage: sagl COMMAND [options]", "", *lines, "", "sagl COMMAND --help shows its options."])


def main(arguments: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: without the program's name; None stands for those of the process.

    Returns:
        The exit code: 0; 2 after a `UserError` or an error of the file system, which are printed as one line; 128 + its
        number after a signal, except 0 for a training that SIGTERM ends after a save.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, *rest = arguments
    if command not in SUBCOMMANDS:
        names, hint = ", ".join(SUBCOMMANDS), suggest(command, SUBCOMMANDS)
        print_error(command, f"the command must be one of {names}, got {command!r}.{hint}")
        return 2
    try:
        with on_stop_signal(raise_interrupted):
            return run_command(command, rest)
    except Interrupted as end:
        if global_rank() == 0:
            print_error(command, str(end))
        ends_well = global_rank() > 0 or (command == "fit" and end.number == signal.SIGTERM and not end.is_lost)
        return 0 if ends_well else 128 + end.number  # launchers kill rank 0 after the failure of another rank


def run_command(command: str, arguments: list[str]) -> int:
    """Run a subcommand and return 0, or 2 after a `UserError` or an error of the file system, which is printed."""
    choose_thread_waiting()
    disable_malloc_trim()
    module = import_module(SUBCOMMANDS[command][0])
    try:
        ignore_stale_ranks()
        module.main(arguments)
    except UserError as error:
        print_error(command, with_flags(str(error), command, module))
        return 2
    except OSError as error:
        if error.errno is None:
            raise
        print_error(command, f"{error.filename or 'a file'}: {error.strerror}.")
        return 2
    return 0


def with_flags(message: str, command: str, module: ModuleType) -> str:
    """Replace the names of parameters in a message by the flags of a command."""
    make_parser = getattr(module, f"{command}_parser", None)
    return make_parser().with_flags(message) if make_parser else message


def print_error(command: str, message: str) -> None:
    """Print a message as one line on stderr."""
    print(f"sagl {command}: {' '.join(message.split())}", file=sys.stderr)


class OptionalOutput(TextIOWrapper):
    """Text output that does not end the command if it cannot be written: `| head` has ended, or its disk is full.

    Characters that its encoding does not have are written as question marks. Every line is written at once, so that the
    log of a batch job has it while the command runs.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._discard()

    def _discard(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def run() -> None:
    """Entry point of the console script."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper) and stream is getattr(sys, f"__{name}__"):  # not a test's or a notebook's
            encoding = stream.encoding
            setattr(sys, name, OptionalOutput(stream.detach(), encoding, "replace", line_buffering=True))
    sys.exit(main())


if __name__ == "__main__":
    run()
