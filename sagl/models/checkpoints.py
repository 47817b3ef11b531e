"""Weights and settings of networks on disk: safetensors, training checkpoints and state dicts.

No code in a file is run: pickles are loaded with `weights_only=True`.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from zipfile import is_zipfile

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
    SETTINGS_CLASSES,
    check_same_network,
    read_metadata,
    require_recommended,
    settings_from_metadata,
)
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import ClassifierSettings, NetworkSettings, UNetSettings
from sagl.settings.sampling import WeightPrecision
from sagl.utils.archives import check_archive
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


def read_state_dict(path: Path, weights: str = "ema") -> Mapping[str, Tensor]:
    """Read the weights of a file, with or without settings; see `read_checkpoint`.

    Raises:
        UserError: As `read_checkpoint`.
    """
    return _read(path, weights)[0]


def load_training_checkpoint(path: Path) -> dict[str, Any]:
    """Load a training checkpoint, memory-mapped.

    Raises:
        UserError: The file is not a training checkpoint of sagl, is damaged, contains code, or weights that are not
            finite.
    """
    content = _load_pickle(path)
    require(
        "state_dict" in content and bool(_hyperparameters(content)),
        f"`checkpoint` must be a training checkpoint of sagl, but {path} is not.",
    )
    _check_tensors(content["state_dict"], path)
    return content


def read_hyperparameters(path: Path) -> dict[str, Any]:
    """Return the metadata of a training checkpoint; empty for another file.

    Raises:
        UserError: The file is damaged, or contains code.
    """
    metadata = _hyperparameters(_load_pickle(path))
    require_recommended(metadata, path)
    return metadata


def write_checkpoint(checkpoint: NetworkWeights, path: Path) -> None:
    """Write a .safetensors file with the settings inside, completely or not at all.

    Raises:
        UserError: The file cannot be written, or the weights are not finite.
    """
    settings, tensors = checkpoint.model_settings, checkpoint.state_dict
    _check_finite(tensors, path)
    metadata: dict[str, Any] = {
        next(key for key, cls in SETTINGS_CLASSES.items() if isinstance(settings, cls)): asdict(settings),
        "diffusion": asdict(checkpoint.diffusion),
        "recommended": dict(checkpoint.recommended),
    }
    metadata[DIGEST_KEY] = _digest(metadata, tensors)
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
        unchanged = digest is None or digest == _digest(metadata, tensors)
        require(unchanged, f"`checkpoint` must be as it was written, but {path} is damaged.")
        return _check_tensors(tensors if metadata else _find_state_dict(tensors, path), path), metadata
    content = _load_pickle(path)
    if _hyperparameters(content):
        content = load_training_checkpoint(path)
        return _select_weights(content, weights, path), content["hyper_parameters"]
    require(weights == "ema", f"`weights` must be left out for {path}, which sagl did not write, got {weights!r}.")
    return _check_tensors(_find_state_dict(content, path), path), {}


def _hyperparameters(content: Mapping[str, Any]) -> dict[str, Any]:
    settings = content.get("hyper_parameters")
    return settings if isinstance(settings, dict) and SETTINGS_CLASSES.keys() & settings else {}


@lru_cache(maxsize=4)
def _check_archive(path: Path, modified: int) -> None:
    check_archive(path)


def _load_pickle(path: Path) -> dict[str, Any]:
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


def _select_weights(content: Mapping[str, Any], weights: str, path: Path) -> Mapping[str, Tensor]:
    """Return the requested weights of a training checkpoint, under the network's own parameter names."""
    choices = {"ema": content["state_dict"]}
    if decay := content["hyper_parameters"].get("ema_decay"):
        choices[f"ema:{decay}"] = content["state_dict"]
    extra_emas = content.get("extra_emas", {})
    require(isinstance(extra_emas, dict), f"`checkpoint` must have extra_emas by decay, but {path} does not.")
    choices |= {f"ema:{decay}": state_dict for decay, state_dict in extra_emas.items()}
    if "current_model_state" in content:
        choices["raw"] = content["current_model_state"]
    require(weights in choices, f"`weights` must be one of {', '.join(choices)} for {path}, got {weights!r}.")
    tensors = choices[weights] if weights == "ema" else _check_tensors(choices[weights], path)
    prefix = "network."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_tensors(tensors: Any, path: Path) -> Mapping[str, Tensor]:  # noqa: ANN401 (any content of a pickle)
    """Refuse anything but finite tensors by name."""
    require(_is_state_dict(tensors), f"`checkpoint` must contain tensors by name, but {path} does not.")
    _check_finite(tensors, path)
    return tensors


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights with nan or infinity, as a training that diverged leaves them."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            values = tensor if tensor.element_size() > 1 else tensor.float()
            finite = all(bool(limit.isfinite()) for limit in values.aminmax())
            require(finite, f"`checkpoint` must have finite weights, but {name} of {path} has nan or infinity.")


def _digest(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the metadata and of names, types, shapes and bytes of the tensors."""
    digest = hashlib.sha256(json.dumps(metadata).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _find_state_dict(content: Mapping[str, Any], path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a file that other code wrote, under the network's own parameter names.

    They may lie under a key (model, state_dict, …); of several, that of an EMA is taken. A prefix that all names share
    is removed: DistributedDataParallel adds `module.`, torch.compile `_orig_mod.`.

    Raises:
        UserError: The file has no tensors by name, or has them under several keys.
    """
    candidates = {"": content} if _is_state_dict(content) else {k: v for k, v in content.items() if _is_state_dict(v)}
    names = [name for name in candidates if len(candidates) == 1 or "ema" in str(name)]
    require(
        len(names) == 1,
        f"`checkpoint` must contain tensors by name, or under one key, but {path} has the keys "
        f"{', '.join(map(str, list(content)[:8]))} with tensors under {', '.join(map(str, candidates)) or 'none'}. "
        "Save them alone: torch.save(content[KEY], FILE).",
    )
    tensors = {name: tensor for name, tensor in candidates[names[0]].items() if name != "n_averaged"}  # AveragedModel
    while all("." in name for name in tensors) and len({name.partition(".")[0] for name in tensors}) == 1:
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    return tensors


def _is_state_dict(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    return bool(value) and all(isinstance(name, str) and _is_plain(tensor) for name, tensor in value.items())


def _is_plain(value: object) -> bool:
    """Return whether this is a tensor of numbers in memory: not sparse, quantized, complex or on the meta device."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_quantized or value.is_complex() or value.is_meta)


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


def check_state_dict(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], hint: str = "") -> None:
    """Refuse a state dict whose names or shapes differ from those of a network.

    Args:
        expected: State dict of the network, as from `meta_state_dict`.
        actual: State dict to check.
        hint: Last words of the message.

    Raises:
        UserError: Counts the differences and lists the first five.
    """
    ours, theirs = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (expected, actual))
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    differences = [f"{n}: settings {ours.get(n, 'have none')}, file {theirs.get(n, 'has none')}" for n in names[:5]]
    require(
        not names,
        f"`checkpoint` must match the network's settings: {len(names)} parameters differ: "
        f"{'; '.join(differences)}.{hint}",
    )


def cast_weights(network: AnyNetwork, precision: WeightPrecision, device: torch.device) -> AnyNetwork:
    """Move a network to a device and cast its weights; computations outside of the network stay in float32.

    The first convolution stays float32: in 16 bits, x_t would be rounded by as much as the noise of the last steps.
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
