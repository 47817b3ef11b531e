"""`sagl validate`: loss by range of timesteps, and bits/dim, on validation images."""

from pathlib import Path

from sagl.commands.fit import run_command
from sagl.configuration.parser import Parser, positionals_first
from sagl.configuration.training import training_parser
from sagl.errors import require
from sagl.utils.files import expand_path

FLAGS_WITHOUT_VALUE = ("--resume", "--help", "--help_all")


def validate_parser() -> Parser:
    return training_parser("validate")


def expand_run_argument(arguments: list[str]) -> list[str]:
    """Replace the folder of a run, the only argument without a flag, by its configuration and EMA weights.

    Later flags replace them; a later config replaces settings of the run's configuration alone.

    Raises:
        UserError: it is not the folder of a run.
    """
    arguments = positionals_first(arguments, FLAGS_WITHOUT_VALUE)
    if not arguments or arguments[0].startswith("-"):
        return arguments
    run = Path(expand_path(arguments[0], "run"))
    config, checkpoint = run / "config.yaml", run / "checkpoints" / "last.ckpt"
    require(
        config.is_file() and checkpoint.is_file(),
        f"`run` must be a folder that sagl fit wrote, with config.yaml and checkpoints/last.ckpt, got {run}.",
    )
    return ["--config", str(config), "--checkpoint", str(checkpoint), "--weights", "ema", *arguments[1:]]


def main(arguments: list[str]) -> None:
    """Evaluate on validation images: `sagl validate RUN`, or `--config FILE --checkpoint FILE`."""
    run_command("validate", expand_run_argument(arguments))
