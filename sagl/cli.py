"""The `sagl` command: a table of verbs, each loaded when it is called, so that help and refusals are quick."""

import sys
from difflib import get_close_matches
from importlib import import_module

from sagl.commands.verbs import VERBS
from sagl.errors import UserError
from sagl.utils.environment import choose_thread_waiting


def usage() -> str:
    """What `sagl --help` prints."""
    lines = [f"  {verb:<12}{line}" for verb, (_, line) in VERBS.items()]
    return "\n".join(["usage: sagl VERB [options]", "", *lines, "", "sagl VERB --help shows the options of a verb."])


def main(arguments: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        The exit code: 0; 2 where the request cannot be met, with one line that says why; 130 where it was stopped.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    verb, *rest = arguments
    try:
        if verb not in VERBS:
            raise UserError(f"verb must be one of {', '.join(VERBS)}, got {verb!r}.{_nearest(verb)} See sagl --help.")
        choose_thread_waiting()
        import_module(VERBS[verb][0]).main(rest)
    except UserError as error:
        return _refuse(verb, str(error))
    except KeyboardInterrupt:
        print(
            f"sagl {verb}: stopped. What is on the disk is whole; the same command goes on from there.", file=sys.stderr
        )
        return 130
    except Exception as error:
        if type(error).__name__ != "ArgumentError":  # the parser's own; not imported for its type alone
            raise
        return _refuse(verb, str(error))
    return 0


def run() -> None:
    """The console script."""
    sys.exit(main())


def _nearest(verb: str) -> str:
    close = get_close_matches(verb, VERBS, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _refuse(verb: str, message: str) -> int:
    line = " ".join(message.split())
    print(f"sagl {verb}: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    run()
