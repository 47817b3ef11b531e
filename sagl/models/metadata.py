"""Metadata of weight files: settings of the network and of the diffusion process, recommended sampling settings."""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sagl.errors import UserError, require
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import SETTINGS_CLASSES, NetworkSettings
from sagl.utils.json_values import from_json

SAFETENSORS = ".safetensors"
"""Suffix of the files that sagl writes."""
WEIGHT_SUFFIXES = (".pt", ".ckpt", SAFETENSORS)
"""Suffixes of the files that sagl reads."""
METADATA_KEY = "sagl"
"""Key of the JSON metadata in the header of a safetensors file."""
DIGEST_KEY = "sha256"
"""Key of the digest of metadata and weights, as a safetensors file has no checksum of its own."""
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library on the header of a file."""
TRAINING_ONLY = ("dropout", "use_checkpoint")
"""Network settings without effect on the output of a trained network."""


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file; empty if none. Keys: one of `SETTINGS_CLASSES`, diffusion, recommended, sha256.

    Of a safetensors file only the header is read, without torch.

    Raises:
        UserError: The file is damaged, or its recommended settings are not a mapping.
    """
    if path.suffix == ".ckpt" and path.is_file():
        from sagl.models.pickles import hyperparameters_of, load_pickle

        metadata = hyperparameters_of(load_pickle(path))
        require_recommended(metadata, path)
        return metadata
    if path.suffix != SAFETENSORS or not path.is_file():
        return {}
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length) if length <= min(size, MAX_HEADER_BYTES) else b"")
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if size != 8 + length + max(ends, default=0):
            raise ValueError("truncated, or with data behind the tensors")
        metadata = dict(json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}")))
    except (struct.error, ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"`checkpoint` must be a complete .safetensors file, but {path} is damaged.") from error
    require_recommended(metadata, path)
    return metadata


def settings_from_metadata(metadata: Mapping[str, Any], path: Path) -> tuple[NetworkSettings, DiffusionSettings]:
    """Build the settings of network and diffusion process from the metadata of the file at `path`.

    Raises:
        UserError: The metadata are not valid settings.
    """
    try:
        key = next(key for key in SETTINGS_CLASSES if key in metadata)
        model_settings = from_json(SETTINGS_CLASSES[key], metadata[key])
        return model_settings, from_json(DiffusionSettings, metadata["diffusion"])
    except (KeyError, TypeError, AttributeError, StopIteration, UserError) as error:
        raise UserError(f"`checkpoint` must contain valid settings, but those in {path} are not: {error}") from error


def require_recommended(metadata: Mapping[str, Any], path: Path) -> None:
    """Refuse recommended settings that are not a mapping.

    Raises:
        UserError: Names the file and the value.
    """
    recommended = metadata.get("recommended") or {}
    require(
        isinstance(recommended, dict),
        f"`recommended` must be a mapping of sampling settings, got {recommended!r:.60} in {path}.",
    )


def check_same_network(expected: NetworkSettings, actual: NetworkSettings, path: Path) -> None:
    """Refuse a file whose network settings differ from the expected ones, except in `TRAINING_ONLY`.

    Raises:
        UserError: Names the first setting that differs.
    """
    actual_values = asdict(actual)
    for name, value in asdict(expected).items():
        require(
            name in TRAINING_ONLY or value == actual_values.get(name),
            f"`model` must agree with `checkpoint`, but {path} has a network with {name} {actual_values.get(name)}, "
            f"not {value}. Leave out `model`.",
        )
