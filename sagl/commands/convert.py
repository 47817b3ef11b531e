"""`sagl convert`: write a network as safetensors with its settings inside, or as a folder for diffusers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sagl.commands._config import (
    add_config_argument,
    model_settings,
    read_configs,
    recommended_settings,
    sample_parser,
    set_recommended_defaults,
)
from sagl.commands._parser import Parser
from sagl.errors import UserError, require
from sagl.models.zoo import get_settings, name_from_filename
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import NetworkSettings
from sagl.utils.files import require_unused, require_writable
from sagl.utils.run_lock import lock_file

if TYPE_CHECKING:
    from sagl.models.checkpoints import NetworkWeights

SUFFIX = ".safetensors"
OTHER_SUFFIXES = (".pt", ".ckpt", ".bin")
"""Suffixes of files that are read but not written; a target with one of them is refused."""


def convert_parser() -> Parser:
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
    recommended = None if args.recommended is None else _parse_json(args.recommended)
    set_recommended_defaults(sample_parser(), recommended or {})
    config = model_settings(read_configs(args.config))
    config_settings = config.get("network") or config.get("classifier")
    model = args.model or config_settings or name_from_filename(Path(args.checkpoint))
    checkpoint = _read(args, model, config.get("diffusion"))
    if recommended is None:
        name = args.checkpoint if model is None else model
        recommended = dict(checkpoint.recommended) or recommended_settings(
            name if isinstance(name, str) else None, None
        )
        set_recommended_defaults(sample_parser(), recommended)
    _write(replace(checkpoint, recommended=recommended), target, args.dtype)
    size = sum(file.stat().st_size for file in (target.iterdir() if target.is_dir() else [target]))
    print(f"{target}: {size / 1e6:.1f} MB, recommended {json.dumps(recommended)}.")


def _check_target(target: Path) -> None:
    """Refuse a target that cannot be written, before anything is read or downloaded."""
    require(
        target.name != SUFFIX and not target.name.endswith(OTHER_SUFFIXES),
        f"`target` must be a file name that ends in .safetensors, or a new folder for diffusers; got {target}.",
    )
    if target.name.endswith(SUFFIX):
        require(not target.is_dir(), f"`target` must be a file, but {target} is a folder.")
    else:
        require_unused(target, "target")
    require_writable(target.absolute().parent, "target", f"Choose another place than {target}.")


def _read(
    args: Any,  # noqa: ANN401 (the parser's namespace)
    model: str | NetworkSettings | None,
    diffusion: DiffusionSettings | None,
) -> "NetworkWeights":
    """Read a folder, a file with given settings, or a network by name."""
    from sagl.models.checkpoints import read_checkpoint
    from sagl.models.diffusers import read_diffusers
    from sagl.models.loading import load

    path = Path(args.checkpoint)
    if path.is_dir():
        for name, default in (("model", None), ("weights", "ema")):
            value = getattr(args, name)
            require(value == default, f"`{name}` must be left out for a folder, got {value}.")
        return read_diffusers(path, diffusion)
    if model is None:
        return load(args.checkpoint, args.weights)
    settings, default_diffusion = get_settings(model) if isinstance(model, str) else (model, None)
    return read_checkpoint(path, args.weights, settings, diffusion or default_diffusion)


def _write(checkpoint: "NetworkWeights", target: Path, dtype: str | None) -> None:
    import torch

    from sagl.models.checkpoints import check_state_dict, in_dtype, meta_state_dict, write_checkpoint
    from sagl.models.diffusers import write_diffusers

    if dtype is not None:
        checkpoint = in_dtype(checkpoint, getattr(torch, dtype))
    if target.name.endswith(SUFFIX):
        check_state_dict(meta_state_dict(checkpoint.model_settings), checkpoint.state_dict)
        write_checkpoint(checkpoint, target)
    else:
        write_diffusers(checkpoint, target)


def _parse_json(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"`recommended` must be a JSON object, got {text!r:.60}.") from error
