"""State dicts of files: what may be in them, and whether they fit a network."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagl.errors import require


def find_state_dict(content: Mapping[str, Any], path: Path) -> Mapping[str, Tensor]:
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


def check_tensors(tensors: Any, path: Path) -> Mapping[str, Tensor]:  # noqa: ANN401 (any content of a pickle)
    """Return the tensors; refuse anything but finite tensors by name.

    Raises:
        UserError: Names the file.
    """
    require(_is_state_dict(tensors), f"`checkpoint` must contain tensors by name, but {path} does not.")
    check_finite(tensors, path)
    return tensors


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights with nan or infinity, as a training that diverged leaves them.

    Raises:
        UserError: Names the first such tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            values = tensor if tensor.element_size() > 1 else tensor.float()
            finite = all(bool(limit.isfinite()) for limit in values.aminmax())
            require(finite, f"`checkpoint` must have finite weights, but {name} of {path} has nan or infinity.")


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


def state_dict_digest(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the metadata and of names, types, shapes and bytes of the tensors."""
    digest = hashlib.sha256(json.dumps(metadata).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_state_dict(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    return bool(value) and all(isinstance(name, str) and _is_plain(tensor) for name, tensor in value.items())


def _is_plain(value: object) -> bool:
    """Return whether this is a tensor of numbers in memory: not sparse, quantized, complex or on the meta device."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_quantized or value.is_complex() or value.is_meta)
