"""The `sagl` command: a table of verbs, each loaded when it is called."""

import sys
from importlib import import_module

from sagl.settings.errors import UserError

VERBS = {
    "fit": ("sagl.commands.fit", "train a network"),
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        import_module(VERBS[arguments[0]][0]).main(arguments[1:])
    except UserError as error:
        print(f"sagl: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
