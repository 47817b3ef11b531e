"""Pickled checkpoints: those of a training, and state dicts. No code in a file is run.

Pickles are loaded with `weights_only=True`.
"""

import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from sagl.errors import UserError, require
from sagl.models.state_dicts import check_tensors
from sagl.settings.network import SETTINGS_CLASSES
from sagl.utils.archives import check_archive


def load_training_checkpoint(path: Path) -> dict[str, Any]:
    """Load a training checkpoint, memory-mapped.

    Raises:
        UserError: The file is not a training checkpoint of sagl, is damaged, contains code, or weights that are not
            finite.
    """
    content = load_pickle(path)
    check_training_checkpoint(content, path)
    return content


def check_training_checkpoint(content: Mapping[str, Any], path: Path) -> None:
    """Refuse the content of a file that is no training checkpoint of sagl, or has weights that are not finite.

    Raises:
        UserError: Names the file.
    """
    require(
        "state_dict" in content and bool(hyperparameters_of(content)),
        f"`checkpoint` must be a training checkpoint of sagl, but {path} is not.",
    )
    check_tensors(content["state_dict"], path)


def load_pickle(path: Path) -> dict[str, Any]:
    """Load a file that torch.save wrote, on the CPU and memory-mapped where the format allows it.

    Raises:
        UserError: The file is damaged, contains code, or no mapping.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about files that it then refuses
            if is_zip := is_zipfile(path):
                _check_archive(path, path.stat().st_mtime_ns)
            content = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"`checkpoint` {path} is damaged, or contains code, which is not run. Download it again, or save it "
            "as .safetensors."
        ) from error
    except Exception as error:  # torch raises many types for a damaged file
        raise UserError(
            f"`checkpoint` must be a .safetensors, .ckpt or .pt file, but {path} is damaged, or of another format."
        ) from error
    require(isinstance(content, dict), f"`checkpoint` must contain tensors by name, but {path} does not.")
    return dict(content)


def select_weights(content: Mapping[str, Any], weights: str, path: Path) -> Mapping[str, Tensor]:
    """Return the requested weights of a training checkpoint, under the network's own parameter names.

    Raises:
        UserError: The checkpoint does not have them, or they are not finite.
    """
    choices = {"ema": content["state_dict"]}
    if decay := content["hyper_parameters"].get("ema_decay"):
        choices[f"ema:{decay}"] = content["state_dict"]
    extra_emas = content.get("extra_emas", {})
    require(isinstance(extra_emas, dict), f"`checkpoint` must have extra_emas by decay, but {path} does not.")
    choices |= {f"ema:{decay}": state_dict for decay, state_dict in extra_emas.items()}
    if "current_model_state" in content:
        choices["raw"] = content["current_model_state"]
    require(weights in choices, f"`weights` must be one of {', '.join(choices)} for {path}, got {weights!r}.")
    tensors = choices[weights] if weights == "ema" else check_tensors(choices[weights], path)
    prefix = "network."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def hyperparameters_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a training checkpoint of sagl; empty for another file."""
    settings = content.get("hyper_parameters")
    return settings if isinstance(settings, dict) and SETTINGS_CLASSES.keys() & settings else {}


@lru_cache(maxsize=4)
def _check_archive(path: Path, modified: int) -> None:
    """Check an archive once; `modified`, the time of its last change, is a part of the key of the cache alone."""
    check_archive(path)
