"""`sagl test`: `sagl validate` on images that neither training nor validation used."""

from sagl.commands._parser import Parser
from sagl.commands.fit import run_command, training_parser
from sagl.commands.validate import expand_run_argument


def test_parser() -> Parser:
    return training_parser("test")


def main(arguments: list[str]) -> None:
    """Evaluate on test images: `sagl test RUN`, or `--config FILE --checkpoint FILE`."""
    run_command("test", expand_run_argument(arguments))
