"""`sagl validate`: loss by quarter of the timesteps and bits/dim, on validation images."""

from sagl.commands.parser import Parser

REST = """RUN stands for a run's config, data and averaged weights; --config and --checkpoint name any others.
The flags of sagl fit can be given too: --data.root, --data.num_validation, --trainer.devices, --preview.num_metric_samples, …"""


def evaluation_parser(verb: str) -> Parser:
    """The flags that are sagl's own, for help and completion."""
    p = Parser(verb, "Loss by quarter of the timesteps, and bits/dim. Nothing is written.", REST)
    p.add_argument("run", type=str, nargs="?", help="A run of sagl fit: its config, data and averaged weights.")
    p.add_argument("--config", type=str, default=None, help="A .yaml file, or the name of a packaged one: lsun_cat.")
    p.add_argument("--checkpoint", type=str, default=None, help="The weights: a file, or a name.")
    p.add_argument("--weights", type=str, default="ema", help="Of a .ckpt: ema, ema:DECAY or raw.")
    return p


def validate_parser() -> Parser:
    """Of `sagl validate`."""
    return evaluation_parser("validate")


def look(verb: str, arguments: list[str]) -> None:
    """Run one of the two verbs.

    Raises:
        UserError, ArgumentError: the settings cannot be met.
    """
    if {"--help", "-h"} & set(arguments):
        print(evaluation_parser(verb).format_help())
        return
    from sagl.commands.training import of_run, run_lightning

    run_lightning(verb, of_run(arguments))


def main(arguments: list[str]) -> None:
    """Look at validation images: `sagl validate RUN`, or `--config FILE --checkpoint FILE`.

    Raises:
        UserError, ArgumentError: the settings cannot be met.
    """
    look("validate", arguments)
