"""`sagl convert`: any network file as safetensors with the settings inside, or as a diffusers folder, and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sagl.commands._config import (
    model_settings,
    read_config,
    sample_parser,
    sampling_settings,
    set_recommended_defaults,
)
from sagl.commands._parser import Parser
from sagl.errors import UserError, require
from sagl.models.zoo import RELEASED, get_settings, name_from_filename
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import NetworkSettings
from sagl.utils.files import require_unused, require_writable

if TYPE_CHECKING:
    from sagl.models.checkpoints import Checkpoint

ENDING = ".safetensors"
OF_OTHER_FILES = (".pt", ".ckpt", ".bin")
"""Endings that no folder should have: who gives one means a file of a kind that is not written."""


def convert_parser() -> Parser:
    """The flags."""
    p = Parser("convert", "Write a network as safetensors with its settings inside, or as a folder for diffusers.")
    p.add_argument("checkpoint", type=str, help="A .safetensors, .ckpt or .pt file, a diffusers folder, or a name.")
    p.add_argument("target", type=str, help="The .safetensors file to write, or a new folder for diffusers.")
    p.add_argument("--model", type=str, default=None, help="The network whose settings a .pt file has, by its name.")
    p.add_argument("--config", type=str, default=None, help="Or a .yaml file whose model describes it.")
    p.add_argument("--weights", type=str, default="ema", help="Of a training checkpoint: ema, ema:DECAY or raw.")
    dtypes = Literal["float32", "float16", "bfloat16"]
    p.add_argument("--dtype", type=dtypes, default=None, help="float32, float16 or bfloat16; else each tensor's own.")
    p.add_argument("--recommended", type=str, default=None, help="Sampling settings to advise, as JSON.")
    return p


def main(arguments: list[str]) -> None:
    """Convert: `sagl convert last.ckpt network.safetensors [--dtype float16] [--recommended JSON]`.

    Raises:
        UserError: the checkpoint cannot be read, or the target not be written; nothing has been written.
    """
    given = convert_parser().parse(arguments)
    target = Path(given.target)
    _require_target(target)
    recommended = None if given.recommended is None else _advice(given.recommended)
    read_metadata = {} if given.config is None else model_settings(read_config(given.config))
    of_config = read_metadata.get("network") or read_metadata.get("classifier")
    model = given.model or of_config or name_from_filename(Path(given.checkpoint))
    file = _read(given, model, read_metadata.get("diffusion"))
    if recommended is None:
        recommended = dict(file.recommended) or _advice_for(given.checkpoint if model is None else model)
    _write(replace(file, recommended=recommended), target, given.dtype)
    size = sum(part.stat().st_size for part in (target.iterdir() if target.is_dir() else [target]))
    print(f"{target}: {size / 1e6:.1f} MB, recommended {json.dumps(recommended)}.")


def _require_target(target: Path) -> None:
    """Refuse what could not be written, before anything is read or fetched."""
    require(
        target.name != ENDING and not target.name.endswith(OF_OTHER_FILES),
        f"`target` must end in .safetensors behind a name, or be a new folder for diffusers; got {target}.",
    )
    if target.name.endswith(ENDING):
        require(not target.is_dir(), f"`target` must be a file, and {target} is a folder.")
    else:
        require_unused(target, "target")
    require_writable(target.absolute().parent, "target", f"Choose another place than {target}.")


def _write(file: "Checkpoint", target: Path, dtype: str | None) -> None:
    import torch

    from sagl.models.checkpoints import check_state_dict, in_dtype, meta_state_dict, write_checkpoint
    from sagl.models.diffusers import write_diffusers

    if dtype is not None:
        file = in_dtype(file, getattr(torch, dtype))
    if target.name.endswith(ENDING):
        check_state_dict(meta_state_dict(file.model_settings), file.state_dict)
        write_checkpoint(file, target)
    else:
        write_diffusers(file, target)


def _read(
    given: Any,  # noqa: ANN401 (the parser's namespace)
    model: str | NetworkSettings | None,
    diffusion: DiffusionSettings | None,
) -> "Checkpoint":
    """A folder, a file with what is said of it, or a network by its name."""
    from sagl.models.checkpoints import read_checkpoint
    from sagl.models.diffusers import read_diffusers
    from sagl.models.loading import load

    path = Path(given.checkpoint)
    if path.is_dir():
        _require_left_out(given)
        return read_diffusers(path, diffusion)
    if model is None:
        return load(given.checkpoint, given.weights)
    settings, process = get_settings(model) if isinstance(model, str) else (model, None)
    return read_checkpoint(path, given.weights, settings, diffusion or process)


def _require_left_out(given: Any) -> None:  # noqa: ANN401
    """Refuse flags that folders leave no choice in."""
    for flag, left_out in (("model", None), ("weights", "ema")):
        value = getattr(given, flag)
        require(value == left_out, f"`{flag}` is for files, and a folder says it itself; got {value}. Leave it out.")


def _advice_for(model: str | NetworkSettings) -> dict[str, Any]:
    """The paper's sampling settings, of the released networks that have them."""
    config = RELEASED[model].config if isinstance(model, str) and model in RELEASED else None
    return sampling_settings(read_config(config)) if config else {}


def _advice(text: str) -> dict[str, Any]:
    """Recommended settings, refused unless `sagl sample` can follow them."""
    try:
        recommended = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"`recommended` must be a JSON object, got {text!r}.") from error
    set_recommended_defaults(sample_parser(), recommended)
    return recommended
