"""Weights and settings of networks on disk: safetensors, training checkpoints and state dicts.

No code in a file is run: pickles are loaded with `weights_only=True`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from sagl.errors import UserError, require
from sagl.models.adm import Classifier, UNet
from sagl.models.cpu_kernels import optimize_for_cpu
from sagl.models.direction_head import DirectionHead
from sagl.models.metadata import (
    DIGEST_KEY,
    METADATA_KEY,
    SAFETENSORS,
    check_same_network,
    read_metadata,
    require_recommended,
    settings_from_metadata,
)
from sagl.models.pickles import check_training_checkpoint, hyperparameters_of, load_pickle, select_weights
from sagl.models.state_dicts import (
    check_finite,
    check_state_dict,
    check_tensors,
    find_state_dict,
    state_dict_digest,
)
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import SETTINGS_CLASSES, ClassifierSettings, NetworkSettings, UNetSettings
from sagl.settings.sampling import WeightPrecision
from sagl.utils.files import atomic_file, is_utf8

AnyNetwork = TypeVar("AnyNetwork", UNet, Classifier)
Built = TypeVar("Built", UNet, Classifier, DirectionHead)
DTYPES: dict[WeightPrecision, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}
"""Data type of the weights, by precision."""


@dataclass(frozen=True, kw_only=True)
class NetworkWeights:
    """Weights of a network with the settings needed to use them."""

    model_settings: NetworkSettings
    diffusion: DiffusionSettings
    state_dict: Mapping[str, Tensor]
    recommended: Mapping[str, Any] = field(default_factory=dict)
    """Recommended sampling settings, by parameter name."""


# --------------------------------------------------------------------------------------------- reading and writing


def read_checkpoint(
    path: Path,
    weights: str = "ema",
    settings: NetworkSettings | None = None,
    diffusion: DiffusionSettings | None = None,
) -> NetworkWeights:
    """Read a .safetensors file, a training checkpoint (.ckpt) or a state dict (.pt), memory-mapped.

    Args:
        path: The file.
        weights: Weights of a training checkpoint: ema, ema:DECAY or raw.
        settings: Network settings. Required for a file without its own, which must agree otherwise.
        diffusion: Diffusion settings for a file without its own; by default ADM's linear schedule.

    Raises:
        UserError: The file does not exist, is not a network, contains code, or disagrees with `settings`.
    """
    state_dict, metadata = _read(path, weights)
    if not metadata:
        if settings is None:
            raise UserError(
                f"`model` must be given for `checkpoint` {path}, which does not contain the settings of its network. "
                "A `config` may describe them instead."
            )
        return NetworkWeights(
            model_settings=settings, diffusion=diffusion or DiffusionSettings(), state_dict=state_dict
        )
    model_settings, diffusion = settings_from_metadata(metadata, path)
    require_recommended(metadata, path)
    if settings is not None:
        check_same_network(settings, model_settings, path)
    recommended = metadata.get("recommended") or {}
    return NetworkWeights(
        model_settings=model_settings, diffusion=diffusion, state_dict=state_dict, recommended=recommended
    )


class Weights(NamedTuple):
    """Weights of a file, with the settings of its network and process if it has them."""

    state_dict: Mapping[str, Tensor]
    settings: NetworkSettings | None = None
    diffusion: DiffusionSettings | None = None


def read_state_dict(path: Path, weights: str = "ema") -> Weights:
    """Read the weights of a file, which need not contain the settings of its network; see `read_checkpoint`.

    Raises:
        UserError: As `read_checkpoint`.
    """
    state_dict, metadata = _read(path, weights)
    return Weights(state_dict, *settings_from_metadata(metadata, path)) if metadata else Weights(state_dict)


def write_checkpoint(checkpoint: NetworkWeights, path: Path) -> None:
    """Write a .safetensors file with the settings inside, completely or not at all.

    Raises:
        UserError: The file cannot be written, or the weights are not finite.
    """
    settings, tensors = checkpoint.model_settings, checkpoint.state_dict
    check_finite(tensors, path)
    metadata: dict[str, Any] = {
        next(key for key, cls in SETTINGS_CLASSES.items() if isinstance(settings, cls)): asdict(settings),
        "diffusion": asdict(checkpoint.diffusion),
        "recommended": dict(checkpoint.recommended),
    }
    metadata[DIGEST_KEY] = state_dict_digest(metadata, tensors)
    with atomic_file(path, "target") as partial:
        save_tensors(tensors, partial, {METADATA_KEY: json.dumps(metadata)})


def save_tensors(state_dict: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write safetensors. To be called inside `atomic_file` or `atomic_folder`, which handle the error.

    Raises:
        OSError: The file cannot be written.
    """
    try:
        tensors = {name: tensor.contiguous() for name, tensor in state_dict.items()}
        if is_utf8(path):
            save_file(tensors, path, metadata=metadata)
        else:
            path.write_bytes(save(tensors, metadata=metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def in_dtype(checkpoint: NetworkWeights, dtype: torch.dtype) -> NetworkWeights:
    """Return the checkpoint with its weights in `dtype`."""
    return replace(checkpoint, state_dict={name: tensor.to(dtype) for name, tensor in checkpoint.state_dict.items()})


def _read(path: Path, weights: str) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Return the state dict and the metadata of a file; the metadata are empty for a plain state dict."""
    require(
        path.is_file() and os.access(path, os.R_OK),
        f"`checkpoint` must be a .safetensors, .ckpt or .pt file, but {path} does not exist or cannot be read.",
    )
    require(
        path.suffix == ".ckpt" or weights == "ema",
        f"`weights` must be left out for {path}, got {weights!r}: only a training checkpoint (.ckpt) has several.",
    )
    if path.suffix == SAFETENSORS:
        metadata = read_metadata(path)
        try:
            tensors = load_file(path) if is_utf8(path) else load(path.read_bytes())
        except (SafetensorError, OSError) as error:
            raise UserError(f"`checkpoint` must be a complete .safetensors file, but {path} is damaged.") from error
        digest = metadata.pop(DIGEST_KEY, None)
        unchanged = digest is None or digest == state_dict_digest(metadata, tensors)
        require(unchanged, f"`checkpoint` must be as it was written, but {path} is damaged.")
        return check_tensors(tensors if metadata else find_state_dict(tensors, path), path), metadata
    content = load_pickle(path)
    if metadata := hyperparameters_of(content):
        check_training_checkpoint(content, path)
        return select_weights(content, weights, path), metadata
    require(weights == "ema", f"`weights` must be left out for {path}, which sagl did not write, got {weights!r}.")
    return check_tensors(find_state_dict(content, path), path), {}


# -------------------------------------------------------------------------------------------------------- networks


def build_network(checkpoint: NetworkWeights) -> UNet:
    """Build the UNet in evaluation mode and float32; float32 tensors are shared, except 3x3 kernels.

    Raises:
        UserError: The checkpoint is a classifier, or names or shapes do not match its settings.
    """
    return _build(checkpoint, UNet, "`checkpoint` must be a diffusion model, but it is a classifier or a head.")


def build_classifier(checkpoint: NetworkWeights) -> Classifier:
    """Build the classifier in evaluation mode and float32.

    Raises:
        UserError: The checkpoint is a diffusion model, or names or shapes do not match its settings.
    """
    message = "`classifier.checkpoint` must be a classifier, but it is a diffusion model or head."
    return _build(checkpoint, Classifier, message)


def build_head(checkpoint: NetworkWeights) -> DirectionHead:
    """Build the direction head in evaluation mode and float32.

    Raises:
        UserError: The checkpoint is another network, or names or shapes do not match its settings.
    """
    message = "`direction_head` must be a direction head, but it is another network."
    return _build(checkpoint, DirectionHead, message)


def meta_state_dict(settings: NetworkSettings) -> dict[str, Tensor]:
    """Return the state dict of a network without storage: names and shapes."""
    return _meta_model(settings).state_dict()


def cast_weights(network: AnyNetwork, precision: WeightPrecision, device: torch.device) -> AnyNetwork:
    """Move a network to a device and cast its weights; computations outside of the network stay in float32.

    The first convolution computes in float32, with weights that are rounded as all others: in 16 bits, x_t would be
    rounded by as much as the noise of the last steps.
    """
    network.to(device=device, dtype=DTYPES[precision])
    network.input_blocks[0].float()
    return network


def _meta_model(settings: NetworkSettings) -> UNet | Classifier | DirectionHead:
    """Return the network without storage."""
    with torch.device("meta"):
        if isinstance(settings, UNetSettings):
            return UNet(settings)
        return Classifier(settings) if isinstance(settings, ClassifierSettings) else DirectionHead(settings)


def _build(checkpoint: NetworkWeights, kind: type[Built], message: str) -> Built:
    """Build a network; refuse one that is not of this kind with the message."""
    network = _meta_model(checkpoint.model_settings)
    if not isinstance(network, kind):
        raise UserError(message)
    check_state_dict(network.state_dict(), checkpoint.state_dict)
    state_dict = {name: tensor.float() for name, tensor in checkpoint.state_dict.items()}
    network.load_state_dict(state_dict, assign=True)
    return optimize_for_cpu(network.to(memory_format=torch.channels_last).eval().requires_grad_(False))
