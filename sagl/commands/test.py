"""`sagl test`: as `sagl validate`, on images that neither training nor validation saw."""

from sagl.commands.parser import Parser
from sagl.commands.validate import evaluation_parser, look


def test_parser() -> Parser:
    """Of `sagl test`."""
    return evaluation_parser("test")


def main(arguments: list[str]) -> None:
    """Look at test images: `sagl test RUN`, or `--config FILE --checkpoint FILE`.

    Raises:
        UserError, ArgumentError: the settings cannot be met.
    """
    look("test", arguments)
