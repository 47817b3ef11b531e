"""The `sagl` command: a table of verbs, each loaded when it is called, so that help and refusals are quick."""

import sys
from importlib import import_module

from sagl.settings.errors import UserError

VERBS = {
    "sample": ("sagl.commands.sample", "draw images from a network, guided or not"),
    "fit": ("sagl.commands.fit", "train a network"),
    "evaluate": ("sagl.commands.evaluate", "Fréchet distance of a run from a reference"),
    "convert": ("sagl.commands.convert", "a training checkpoint as safetensors"),
}


def usage() -> str:
    """What `sagl --help` prints."""
    lines = [f"  {verb:<10}{line}" for verb, (_, line) in VERBS.items()]
    return "\n".join(["usage: sagl VERB [options]", "", *lines, "", "sagl VERB --help shows the options of a verb."])


def main(arguments: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, or 2 where the request cannot be met, with one line that says why.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    verb, *rest = arguments
    try:
        if verb not in VERBS:
            raise UserError(f"verb must be one of {', '.join(VERBS)}, got {verb!r}. See sagl --help.")
        import_module(VERBS[verb][0]).main(rest)
    except UserError as error:
        return _refuse(verb, str(error))
    except Exception as error:
        if type(error).__name__ != "ArgumentError":  # the parser's own; not imported for its type alone
            raise
        return _refuse(verb, str(error))
    return 0


def run() -> None:
    """The console script."""
    sys.exit(main())


def _refuse(verb: str, message: str) -> int:
    line = " ".join(message.split())
    print(f"sagl {verb}: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    run()
