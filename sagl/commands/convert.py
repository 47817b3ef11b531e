"""`sagl convert`: a training checkpoint as safetensors with the settings inside."""

import json
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from sagl.commands.sample import advise
from sagl.commands.sample import parser as sample_parser
from sagl.settings.errors import UserError, require


def parser() -> ArgumentParser:
    """The flags."""
    p = ArgumentParser(
        prog="sagl convert", description="Write a network as safetensors, settings inside.", exit_on_error=False
    )
    p.add_argument("checkpoint", help="What sagl fit wrote (.ckpt), or a .safetensors file of sagl.")
    p.add_argument("file", help="The .safetensors file to write.")
    p.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="Which of a training checkpoint's.")
    p.add_argument("--dtype", type=Literal["float32", "float16", "bfloat16"], default="float32", help="Of the file.")
    p.add_argument("--recommended", type=str, default=None, help="Sampling settings to advise, as JSON.")
    return p


def main(arguments: list[str]) -> None:
    """Convert: `sagl convert last.ckpt network.safetensors [--dtype float16] [--recommended JSON]`.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    given = parser().parse_args(arguments)
    target = Path(given.file)
    require(target.suffix == ".safetensors", f"`file` must end in .safetensors, got {target}.")
    recommended = None if given.recommended is None else _advice(given.recommended)
    from dataclasses import replace

    import torch

    from sagl.models.checkpoints import build_network, read_network, write_network

    file = read_network(Path(given.checkpoint), given.weights)
    if recommended is not None:
        file = replace(file, recommended=recommended)
    build_network(file)  # names and shapes fit, or nothing is written
    write_network(file, target, getattr(torch, given.dtype))
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, recommended {json.dumps(dict(file.recommended))}.")


def _advice(text: str) -> dict[str, Any]:
    """Recommended settings, refused unless `sagl sample` can follow them."""
    try:
        recommended = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"`recommended` must be a JSON object, got {text!r}.") from error
    advise(sample_parser(), recommended)
    return recommended
