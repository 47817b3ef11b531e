"""Networks on disk: safetensors with the settings inside; training checkpoints, read without running code in them."""

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sagl.errors import UserError, require
from sagl.models.adm import Classifier, UNet
from sagl.models.cpu_kernels import optimize_for_cpu
from sagl.models.metadata import (
    METADATA_KEY,
    SETTINGS_CLASSES,
    check_same_network,
    read_metadata,
    require_recommended,
    settings_from_metadata,
)
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import NetworkSettings, UNetSettings
from sagl.settings.sampling import WeightPrecision
from sagl.utils.files import atomic_file

AnyNetwork = TypeVar("AnyNetwork", UNet, Classifier)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A network's weights, with all that is needed to use them."""

    model_settings: NetworkSettings
    diffusion: DiffusionSettings
    state_dict: Mapping[str, Tensor]
    recommended: Mapping[str, Any] = field(default_factory=dict)
    """Sampling settings that the makers of the weights advise, by flag name."""


def read_checkpoint(
    path: Path,
    weights: str = "ema",
    settings: NetworkSettings | None = None,
    diffusion: DiffusionSettings | None = None,
) -> Checkpoint:
    """Weights and settings of a .safetensors file, a training checkpoint (.ckpt) or a plain state dict (.pt).

    Tensors are mapped from the disk (`build_network` lays out 3x3 kernels anew), and nothing in the file is run.

    Args:
        path: the file.
        weights: of a training checkpoint, the average (ema; ema:DECAY names which) or the last weights (raw).
        settings: of the network; a plain state dict needs them, others carry their own, which must then agree.
        diffusion: of the process, where the file does not say; ADM's linear schedule if left out.

    Raises:
        UserError: no such file, not a network, other settings, or a pickle that wants to run code.
    """
    tensors, about = _read(path, weights)
    if about is None:
        if settings is None:
            raise UserError(
                f"`checkpoint` {path} does not say which network it is for. Add --model NAME, or --config FILE."
            )
        return Checkpoint(
            model_settings=settings, diffusion=diffusion or DiffusionSettings(), state_dict=_plain(tensors, path)
        )
    file = _network_file(about, tensors, path, weights)
    if settings is not None:
        check_same_network(settings, file.model_settings, path)
    return file


def read_state_dict(path: Path, weights: str = "ema") -> Mapping[str, Tensor]:
    """The weights of a file alone, whatever network they are for; see `read_checkpoint`.

    Raises:
        UserError: as `read_checkpoint`.
    """
    tensors, about = _read(path, weights)
    return _plain(tensors, path) if about is None else _network_file(about, tensors, path, weights).state_dict


def in_dtype(file: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """The same network with its weights in `dtype`."""
    return replace(file, state_dict={name: tensor.to(dtype) for name, tensor in file.state_dict.items()})


def write_checkpoint(file: Checkpoint, path: Path) -> None:
    """Write safetensors with the settings inside, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    about = {
        next(name for name, kind in SETTINGS_CLASSES.items() if isinstance(file.model_settings, kind)): asdict(
            file.model_settings
        ),
        "diffusion": asdict(file.diffusion),
        "recommended": dict(file.recommended),
    }
    with atomic_file(path, "target") as partial:
        save_tensors(file.state_dict, partial, {METADATA_KEY: json.dumps(about)})


def save_tensors(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write safetensors; to be called inside `atomic_file` or `atomic_folder`.

    Raises:
        OSError: the system's own, which safetensors wraps.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(*((int(number[1]), os.strerror(int(number[1]))) if number else (str(error),))) from error


def build_network(file: Checkpoint) -> UNet:
    """The UNet in evaluation mode and float32, strictly loaded; float32 tensors are shared, but for 3x3 kernels.

    Raises:
        UserError: it is a classifier; or names or shapes do not fit the settings: names the first five.
    """
    network = _hollow(file.model_settings)
    if not isinstance(network, UNet):
        raise UserError("`checkpoint` must be a network that draws, and this one is a classifier.")
    return _loaded(network, file.state_dict)


def build_classifier(file: Checkpoint) -> Classifier:
    """The classifier in evaluation mode and float32, strictly loaded.

    Raises:
        UserError: it is no classifier; or names or shapes do not fit the settings: names the first five.
    """
    network = _hollow(file.model_settings)
    if not isinstance(network, Classifier):
        raise UserError("`classifier.checkpoint` must be a classifier, and this is a network that draws.")
    return _loaded(network, file.state_dict)


def meta_state_dict(settings: NetworkSettings) -> dict[str, Tensor]:
    """The state dict of a network without storage: names and shapes."""
    return _hollow(settings).state_dict()


def check_state_dict(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor], way_out: str = "") -> None:
    """Refuse weights whose names or shapes are not those of a network's parameters.

    Args:
        parameters: what the settings ask for, as `meta_state_dict` gives it.
        state: the weights.
        way_out: said last.

    Raises:
        UserError: counts what differs and shows the first five.
    """
    expected, found = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (parameters, state))
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    shown = "; ".join(
        f"{name}: settings {expected.get(name, 'have none')}, file {found.get(name, 'has none')}" for name in wrong[:5]
    )
    require(
        not wrong, f"`checkpoint` must fit the network's settings: {len(wrong)} parameters differ: {shown}.{way_out}"
    )


DTYPES: dict[WeightPrecision, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}
"""Of weights, by their precision."""


def cast_weights(network: AnyNetwork, precision: WeightPrecision, device: torch.device) -> AnyNetwork:
    """The network on a device, its weights in the precision; the arithmetic around it stays float32.

    So does the first convolution: in 16 bits, x_t would be rounded by as much as the noise in it at the last steps.
    """
    network.to(device=device, dtype=DTYPES[precision])
    network.input_blocks[0].float()
    return network


def load_training_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint, memory-mapped, without running code in it.

    Raises:
        UserError: it is none, or a pickle that wants to run code.
    """
    checkpoint = _load_pickle(path)
    settings = checkpoint.get("hyper_parameters")
    require(
        "state_dict" in checkpoint and isinstance(settings, dict) and bool(SETTINGS_CLASSES.keys() & settings),
        f"`checkpoint` must be one that sagl fit wrote, and {path} is none.",
    )
    return checkpoint


def _load_pickle(path: Path) -> dict[str, Any]:
    require(
        not _is_safetensors(path),
        f"`checkpoint` {path} is a safetensors file under another ending. Its name should end in .safetensors.",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on files that it refuses in the same breath
            loaded = torch.load(path, map_location="cpu", mmap=is_zipfile(path), weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"`checkpoint` {path} is damaged, or a pickle that wants to run code, which sagl refuses. Fetch it again, "
            "or write its tensors as .safetensors."
        ) from error
    except Exception as error:  # torch reports a bad file in many ways
        raise UserError(
            f"`checkpoint` must be a whole .safetensors, .ckpt or .pt file, and {path} is damaged or none."
        ) from error
    require(isinstance(loaded, dict), f"`checkpoint` must hold tensors by name, and {path} holds other things.")
    return dict(loaded)


def _read(path: Path, weights: str) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """What a file holds, and what it says of it."""
    require(path.is_file(), f"`checkpoint` must be a .safetensors, .ckpt or .pt file, and there is none at {path}.")
    require(os.access(path, os.R_OK), f"`checkpoint` must be a file that you may read, not {path}.")
    require(
        path.suffix == ".ckpt" or weights == "ema",
        f"`weights` is for training checkpoints (.ckpt), and {path} holds one set of weights. Leave it out.",
    )
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header, and the header, which is JSON."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError:
        return False
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _read_pickle(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Its content, and its settings if sagl fit wrote it."""
    loaded = _load_pickle(path)
    return loaded, loaded.get("hyper_parameters") if "state_dict" in loaded else None


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    about = read_metadata(path)
    try:
        return load_file(path), about or None
    except (SafetensorError, OSError) as error:
        raise UserError(f"`checkpoint` must be a whole .safetensors file, and {path} is damaged.") from error


def _plain(tensors: Mapping[str, Any], path: Path) -> Mapping[str, Tensor]:
    """The tensors, if they are nothing else.

    Raises:
        UserError: names that are no text, values that are no tensors, or nothing at all.
    """
    named = isinstance(tensors, Mapping) and all(isinstance(name, str) for name in tensors)
    require(
        named and bool(tensors) and all(isinstance(tensor, Tensor) for tensor in tensors.values()),
        f"`checkpoint` must hold a network's tensors by name, and {path} holds other things.",
    )
    return tensors


def _network_file(about: Mapping[str, Any], content: Mapping[str, Any], path: Path, weights: str) -> Checkpoint:
    network, diffusion = settings_from_metadata(about, path)
    require_recommended(about, path)
    state = _averaged(content, weights, path) if "state_dict" in content else _plain(content, path)
    return Checkpoint(
        model_settings=network, diffusion=diffusion, state_dict=state, recommended=about.get("recommended") or {}
    )


def _averaged(checkpoint: Mapping[str, Any], weights: str, path: Path) -> Mapping[str, Tensor]:
    """The weights asked for, of those that a training checkpoint holds."""
    decay = checkpoint["hyper_parameters"].get("ema_decay")
    held = {"ema": checkpoint["state_dict"], f"ema:{decay}": checkpoint["state_dict"]}
    held |= {f"ema:{other}": state for other, state in checkpoint.get("extra_emas", {}).items()}
    held |= {"raw": checkpoint["current_model_state"]} if "current_model_state" in checkpoint else {}
    known = [name for name in held if name != "ema:None"]
    require(weights in known, f"`weights` must be one of {', '.join(known)} for {path}, got {weights!r}.")
    tensors = _plain(held[weights], path)
    prefix = "network."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _hollow(settings: NetworkSettings) -> UNet | Classifier:
    """The network without storage."""
    with torch.device("meta"):
        return UNet(settings) if isinstance(settings, UNetSettings) else Classifier(settings)


def _loaded(network: AnyNetwork, state: Mapping[str, Tensor]) -> AnyNetwork:
    check_state_dict(network.state_dict(), state)
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return optimize_for_cpu(network.to(memory_format=torch.channels_last).eval().requires_grad_(False))
