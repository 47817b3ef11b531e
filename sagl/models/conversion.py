"""Reading and writing of a network in any format: safetensors, training checkpoint, .pt file, folder for diffusers."""

from pathlib import Path

import torch

from sagl.errors import require
from sagl.models.checkpoints import (
    NetworkWeights,
    in_dtype,
    meta_state_dict,
    read_checkpoint,
    write_checkpoint,
)
from sagl.models.diffusers import read_diffusers, write_diffusers
from sagl.models.loading import load
from sagl.models.metadata import SAFETENSORS
from sagl.models.state_dicts import check_state_dict
from sagl.models.zoo import get_settings
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import NetworkSettings


def read_network(
    checkpoint: str,
    weights: str = "ema",
    model: str | NetworkSettings | None = None,
    diffusion: DiffusionSettings | None = None,
) -> NetworkWeights:
    """Read a folder of diffusers, a file, or a network by name.

    Args:
        checkpoint: path or name.
        weights: weights of a training checkpoint: ema, ema:DECAY or raw.
        model: name or settings of the network, for a file without them.
        diffusion: process of the network; None for that of the file or of `model`.

    Raises:
        UserError: it cannot be read, or `weights` is given for a folder.
    """
    path = Path(checkpoint)
    if path.is_dir():
        require(weights == "ema", f"`weights` must be left out for a folder, got {weights}.")
        return read_diffusers(path, diffusion)
    if model is None:
        return load(checkpoint, weights)
    settings, default_diffusion = get_settings(model) if isinstance(model, str) else (model, None)
    return read_checkpoint(path, weights, settings, diffusion or default_diffusion)


def write_network(network: NetworkWeights, target: Path, dtype: str | None = None) -> None:
    """Write a network to a .safetensors file, or else to a new folder for diffusers.

    Args:
        network: weights and settings.
        target: the file or folder.
        dtype: data type of the weights, such as float16; None for that of each tensor.

    Raises:
        UserError: it cannot be written, or diffusers has no such network.
    """
    if dtype is not None:
        network = in_dtype(network, getattr(torch, dtype))
    if target.name.endswith(SAFETENSORS):
        check_state_dict(meta_state_dict(network.model_settings), network.state_dict)
        write_checkpoint(network, target)
    else:
        write_diffusers(network, target)
