"""`sagl validate`: loss by range of timesteps, and bits/dim, on validation images."""

from pathlib import Path

from sagl.commands.fit import run_command
from sagl.configuration.parser import Parser
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
    place = next((k for k in range(len(arguments)) if _has_no_flag(arguments, k)), None)
    if place is None:
        return arguments
    run = Path(expand_path(arguments[place], "run"))
    others = arguments[:place] + arguments[place + 1 :]
    config, checkpoint = run / "config.yaml", run / "checkpoints" / "last.ckpt"
    require(
        config.is_file() and checkpoint.is_file(),
        f"`run` must be a folder that sagl fit wrote, with config.yaml and checkpoints/last.ckpt, got {run}.",
    )
    return ["--config", str(config), "--checkpoint", str(checkpoint), "--weights", "ema", *others]


def _has_no_flag(arguments: list[str], place: int) -> bool:
    """Return whether an argument is neither a flag nor the value of one."""
    before = arguments[place - 1] if place else ""
    takes_value = before.startswith("--") and "=" not in before and before not in FLAGS_WITHOUT_VALUE
    return not arguments[place].startswith("-") and not takes_value


def main(arguments: list[str]) -> None:
    """Evaluate on validation images: `sagl validate RUN`, or `--config FILE --checkpoint FILE`."""
    run_command("validate", expand_run_argument(arguments))
