"""Networks on disk: safetensors with the settings inside; training checkpoints, read without running code in them."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sagl.models.adm import UNet
from sagl.models.zoo import METADATA_KEY, described
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.errors import UserError, require
from sagl.settings.network import UNetSettings

Weights = Literal["ema", "raw"]


@dataclass(frozen=True, kw_only=True)
class NetworkFile:
    """A UNet's weights, with all that is needed to use them."""

    network: UNetSettings
    diffusion: DiffusionSettings
    state: Mapping[str, Tensor]
    recommended: Mapping[str, Any] = field(default_factory=dict)
    """Sampling settings that the makers of the weights advise, by flag name."""


def read_network(path: Path, weights: Weights = "ema") -> NetworkFile:
    """Weights and settings from a sagl .safetensors file or a training checkpoint (.ckpt).

    Args:
        path: the file.
        weights: of a training checkpoint, the average (ema) or the last weights (raw).

    Raises:
        UserError: no such file, not a network of sagl, or a pickle that wants to run code.
    """
    require(path.is_file(), f"`checkpoint` must be a .safetensors or .ckpt file, and there is none at {path}.")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_training(path, weights)


def write_network(file: NetworkFile, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write safetensors with the settings inside, whole or not at all."""
    about = {
        "network": asdict(file.network),
        "diffusion": asdict(file.diffusion),
        "recommended": dict(file.recommended),
    }
    partial = path.with_suffix(".partial")
    state = {name: tensor.to(dtype).contiguous() for name, tensor in file.state.items()}
    save_file(state, partial, metadata={METADATA_KEY: json.dumps(about)})
    os.replace(partial, path)


def build_network(file: NetworkFile) -> UNet:
    """The UNet in evaluation mode and float32, strictly loaded.

    Raises:
        UserError: names or shapes do not fit the settings; names the first that do not.
    """
    with torch.device("meta"):
        network = UNet(file.network)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in file.state.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"`checkpoint` must fit the network's settings: {len(wrong)} parameters differ, the first {name}: "
            f"settings {expected.get(name, 'have none')}, file {found.get(name, 'has none')}."
        )
    network.load_state_dict({name: tensor.float() for name, tensor in file.state.items()}, assign=True)
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_training_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint, memory-mapped, without running code in it.

    Raises:
        UserError: it is none, or a pickle that wants to run code.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        require("state_dict" in checkpoint and "network" in checkpoint["hyper_parameters"], "another project's")
        return dict(checkpoint)
    except Exception as error:  # torch reports a bad file in many ways
        raise UserError(
            f"`checkpoint` must be one that sagl fit wrote; {path} is none ({type(error).__name__})."
        ) from error


def _read_safetensors(path: Path) -> NetworkFile:
    about = described(path)
    require(bool(about), f"`checkpoint` must carry sagl's settings, and {path} does not. Write it with sagl convert.")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"`checkpoint` must be a whole .safetensors file, and {path} is damaged.") from error
    return _network_file(about, state, path, about.get("recommended", {}))


def _read_training(path: Path, weights: Weights) -> NetworkFile:
    checkpoint = load_training_checkpoint(path)
    prefix, part = "network.", "state_dict" if weights == "ema" else "current_model_state"
    require(part in checkpoint, f"`weights` {weights} are not in {path}. Try --weights ema.")
    state = {name.removeprefix(prefix): tensor for name, tensor in checkpoint[part].items() if name.startswith(prefix)}
    return _network_file(checkpoint["hyper_parameters"], state, path, {})


def _network_file(
    about: Mapping[str, Any], state: Mapping[str, Tensor], path: Path, recommended: Mapping[str, Any]
) -> NetworkFile:
    try:
        network = UNetSettings(**_tuples(about["network"]))
        diffusion = DiffusionSettings(**about["diffusion"])
    except (KeyError, TypeError) as error:
        raise UserError(f"`checkpoint` must carry sagl's settings, and those in {path} are others.") from error
    return NetworkFile(network=network, diffusion=diffusion, state=state, recommended=recommended)


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
