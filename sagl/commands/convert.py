"""`sagl convert`: write a network as safetensors with its settings inside, or as a folder for diffusers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from sagl.configuration.parser import Parser
from sagl.configuration.sample import (
    add_config_argument,
    model_settings,
    recommended_settings,
    sample_parser,
    set_recommended_defaults,
)
from sagl.errors import UserError, require
from sagl.models.metadata import SAFETENSORS
from sagl.models.zoo import name_from_filename
from sagl.utils.config_files import read_configs
from sagl.utils.files import require_unused
from sagl.utils.run_lock import lock_file

OTHER_SUFFIXES = (".pt", ".ckpt", ".bin")
"""Suffixes of files that are read but not written; a target with one of them is refused."""


def convert_parser() -> Parser:
    """Build the parser of `sagl convert`."""
    p = Parser("convert", "Write a network as safetensors with its settings inside, or as a folder for diffusers.")
    p.add_argument("checkpoint", type=str, help="A .safetensors, .ckpt or .pt file, a diffusers folder, or a name.")
    p.add_argument("target", type=str, help="The .safetensors file to write, or a new folder for diffusers.")
    p.add_argument("--model", type=str, default=None, help="Name of the network whose settings a .pt file has.")
    add_config_argument(p, "Config whose model describes the network of a .pt file.")
    p.add_argument("--weights", type=str, default="ema", help="Weights of a training checkpoint: ema, ema:DECAY, raw.")
    dtypes = Literal["float32", "float16", "bfloat16"]
    p.add_argument("--dtype", type=dtypes, default=None, help="Data type to write; by default that of each tensor.")
    p.add_argument("--recommended", type=str, default=None, help="Recommended sampling settings, as JSON.")
    return p


def main(arguments: list[str]) -> None:
    """Run `sagl convert last.ckpt network.safetensors [--dtype float16] [--recommended JSON]`.

    Raises:
        UserError: The checkpoint cannot be read, or the target not be written; nothing has been written.
    """
    args = convert_parser().parse(arguments)
    target = Path(args.target)
    with lock_file(target, "target"):
        _check_target(target)
        _convert(args, target)


def _convert(args: Any, target: Path) -> None:  # noqa: ANN401 (the parser's namespace)
    from sagl.models.loading import read_network, write_network

    recommended = None if args.recommended is None else _parse_json(args.recommended)
    set_recommended_defaults(sample_parser(), recommended or {})
    config = model_settings(read_configs(args.config))
    config_settings = config.get("network") or config.get("classifier")
    require(
        args.model is None or not Path(args.checkpoint).is_dir(),
        f"`model` must be left out for a folder, got {args.model}.",
    )
    model = args.model or config_settings or name_from_filename(Path(args.checkpoint))
    checkpoint = read_network(args.checkpoint, args.weights, model, config.get("diffusion"))
    if recommended is None:
        name = args.checkpoint if model is None else model
        recommended = dict(checkpoint.recommended) or recommended_settings(
            name if isinstance(name, str) else None, None
        )
        set_recommended_defaults(sample_parser(), recommended)
    write_network(replace(checkpoint, recommended=recommended), target, args.dtype)
    size = sum(file.stat().st_size for file in (target.iterdir() if target.is_dir() else [target]))
    print(f"{target}: {size / 1e6:.1f} MB, recommended {json.dumps(recommended)}.")


def _check_target(target: Path) -> None:
    """Refuse a target of the wrong kind, before anything is read or downloaded."""
    require(
        target.name != SAFETENSORS and not target.name.endswith(OTHER_SUFFIXES),
        f"`target` must be a file name that ends in .safetensors, or a new folder for diffusers; got {target}.",
    )
    if target.name.endswith(SAFETENSORS):
        require(not target.is_dir(), f"`target` must be a file, but {target} is a folder.")
    else:
        require_unused(target, "target")


def _parse_json(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise UserError(f"`recommended` must be a JSON object with every name once, got {text!r:.60}.") from error
    require(isinstance(content, dict), f"`recommended` must be a JSON object, got {text!r:.60}.")
    return dict(content)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name is repeated")
    return content
