"""`sagl fit`, and `run_command`, which `sagl validate` and `sagl test` use too."""

from sagl.configuration.parser import Parser, parse_interval_arg
from sagl.configuration.training import (
    Kind,
    put_configs_first,
    rename_network_flags,
    training_kind,
    training_parser,
)
from sagl.errors import require


def fit_parser() -> Parser:
    return training_parser("fit")


def run_command(command: str, arguments: list[str]) -> None:
    """Print the help, or parse the command line and run `fit`, `validate` or `test`.

    Raises:
        UserError: the settings are not valid; nothing has been written.
    """
    if {"--help", "-h"} & set(arguments):
        print(training_parser(command).format_help())
        return
    arguments = parse_interval_arg(rename_network_flags(put_configs_first(arguments)))
    kind = training_kind(arguments)
    parser = training_parser(command, kind=kind, full=True)
    require(
        kind != "direction_head" or command == "fit",
        f"`model.direction_head` is for sagl fit, which validates on held-out chains, got sagl {command}.",
    )
    if kind != "network":
        _refuse_diffusion_options(arguments, parser, kind)
    if "--help_all" in arguments:
        print(parser.format_help())
        return
    from sagl.commands.training import run

    run(command, parser, parser.parse(arguments))


def _refuse_diffusion_options(arguments: list[str], parser: Parser, kind: Kind) -> None:
    """Refuse the options that only the parser for diffusion models has, such as --preview.scales, with the reason."""
    options = training_parser("fit")._option_string_actions.keys() - parser._option_string_actions.keys()
    flags = [flag for argument in arguments if (flag := argument.partition("=")[0]) in options]
    require(not flags, f"{', '.join(flags)} must be left out for `model.{kind}`.")


def main(arguments: list[str]) -> None:
    """Train: `sagl fit --config FILE --output DIR [--resume]`."""
    run_command("fit", arguments)
