"""`sagl convert`: a training checkpoint as safetensors with the settings inside."""

import json
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser


def parser() -> ArgumentParser:
    """The flags."""
    p = ArgumentParser(
        prog="sagl convert", description="Write a network as safetensors, settings inside.", exit_on_error=False
    )
    p.add_argument("checkpoint", help="What sagl fit wrote (.ckpt), or a .safetensors file of sagl.")
    p.add_argument("file", help="The .safetensors file to write.")
    p.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="Which of a training checkpoint's.")
    p.add_argument("--dtype", type=Literal["float32", "float16", "bfloat16"], default="float32", help="Of the file.")
    p.add_argument("--recommended", type=dict[str, Any], default=None, help="Sampling settings to advise, as JSON.")
    return p


def main(arguments: list[str]) -> None:
    """Convert: `sagl convert last.ckpt network.safetensors [--dtype float16] [--recommended JSON]`.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    given = parser().parse_args(arguments)
    from dataclasses import replace

    import torch

    from sagl.models.checkpoints import build_network, read_network, write_network

    file = read_network(Path(given.checkpoint), given.weights)
    if given.recommended is not None:
        file = replace(file, recommended=given.recommended)
    build_network(file)  # names and shapes fit, or nothing is written
    write_network(file, Path(given.file), getattr(torch, given.dtype))
    size = Path(given.file).stat().st_size / 1e6
    print(f"{given.file}: {size:.1f} MB, recommended {json.dumps(dict(file.recommended))}.")
