"""`sagl test`: `sagl validate` on images that neither training nor validation used."""

from sagl.commands.fit import run_command
from sagl.commands.validate import expand_run_argument
from sagl.configuration.parser import Parser
from sagl.configuration.training import training_parser


def test_parser() -> Parser:
    return training_parser("test")


def main(arguments: list[str]) -> None:
    """Evaluate on test images: `sagl test RUN`, or `--config FILE --checkpoint FILE`."""
    run_command("test", expand_run_argument(arguments))
