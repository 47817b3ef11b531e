"""`sagl convert`: any network file as safetensors with the settings inside, or as a diffusers folder, and back."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sagl.commands.parser import Parser
from sagl.commands.request import advise, find_source, model_part, read_config, sample_parser
from sagl.settings.errors import UserError, require

if TYPE_CHECKING:
    from sagl.models.checkpoints import NetworkFile


def convert_parser() -> Parser:
    """The flags."""
    p = Parser("convert", "Write a network as safetensors with its settings inside, or as a folder for diffusers.")
    p.add_argument("checkpoint", type=str, help="A .safetensors, .ckpt or .pt file, a diffusers folder, or a name.")
    p.add_argument("target", type=str, help="The .safetensors file to write, or a new folder for diffusers.")
    p.add_argument("--model", type=str, default=None, help="The released network whose settings a .pt file has.")
    p.add_argument("--config", type=str, default=None, help="Or a .yaml file whose model.network describes it.")
    p.add_argument("--weights", type=str, default="ema", help="Of a training checkpoint: ema, ema:DECAY or raw.")
    dtypes = Literal["float32", "float16", "bfloat16"]
    p.add_argument("--dtype", type=dtypes, default="float32", help="Of the file.")
    p.add_argument("--recommended", type=str, default=None, help="Sampling settings to advise, as JSON.")
    return p


def main(arguments: list[str]) -> None:
    """Convert: `sagl convert last.ckpt network.safetensors [--dtype float16] [--recommended JSON]`.

    Raises:
        UserError: the checkpoint cannot be read; nothing has been written.
    """
    given = convert_parser().parse(arguments)
    target = Path(given.target)
    require(
        target.suffix in (".safetensors", ""),
        f"`target` must end in .safetensors, or be a new folder for diffusers; got {target}.",
    )
    recommended = None if given.recommended is None else _advice(given.recommended)
    from dataclasses import replace

    import torch

    from sagl.models.checkpoints import require_fit, write_network
    from sagl.models.diffusers import write_diffusers

    file = _read(given)
    if recommended is not None:
        file = replace(file, recommended=recommended)
    require_fit(file.network, file.state)  # or nothing is written
    dtype = getattr(torch, given.dtype)
    if target.suffix:
        write_network(file, target, dtype)
    else:
        write_diffusers(replace(file, state={name: tensor.to(dtype) for name, tensor in file.state.items()}), target)
    size = sum(part.stat().st_size for part in (target.iterdir() if target.is_dir() else [target]))
    print(f"{target}: {size / 1e6:.1f} MB, recommended {json.dumps(dict(file.recommended))}.")


def _read(given: Any) -> "NetworkFile":  # noqa: ANN401 (the parser's namespace)
    from sagl.models.checkpoints import read_network
    from sagl.models.diffusers import read_diffusers
    from sagl.models.loading import load

    path = Path(given.checkpoint)
    if path.is_dir():
        return read_diffusers(path)
    if given.model is None and given.config is None:
        return load(given.checkpoint, given.weights)
    model, diffusion = given.model, None
    if given.config is not None:
        part = model_part(read_config(given.config))
        model, diffusion = model or part.get("network"), part.get("diffusion")
    source = find_source(model, given.checkpoint, diffusion, given.weights)
    return read_network(path, given.weights, source.network, source.diffusion)


def _advice(text: str) -> dict[str, Any]:
    """Recommended settings, refused unless `sagl sample` can follow them."""
    try:
        recommended = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"`recommended` must be a JSON object, got {text!r}.") from error
    advise(sample_parser(), recommended)
    return recommended
