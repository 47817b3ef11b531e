"""Metadata of weight files: settings of the network and of the diffusion process, recommended sampling settings."""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from sagl.errors import UserError, require
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import ClassifierSettings, NetworkSettings, UNetSettings

Settings = TypeVar("Settings")

METADATA_KEY = "sagl"
"""Key of the JSON metadata in the header of a safetensors file."""
SETTINGS_CLASSES: dict[str, type[NetworkSettings]] = {"network": UNetSettings, "classifier": ClassifierSettings}
"""Keys of the network settings in the metadata; a file has one of them."""
TRAINING_ONLY = ("dropout", "use_checkpoint")
"""Network settings without effect on the output of a trained network."""


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file with keys network or classifier, diffusion, recommended; empty if it has none.

    Of a safetensors file only the header is read, without torch.

    Raises:
        UserError: The file is damaged, or its recommended settings are not a mapping.
    """
    if path.suffix == ".ckpt" and path.is_file():
        from sagl.models.checkpoints import read_hyperparameters

        return read_hyperparameters(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if path.stat().st_size != 8 + length + max(ends, default=0):
            raise ValueError("truncated, or with data behind the tensors")
        metadata = dict(json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}")))
    except (struct.error, ValueError, AttributeError, TypeError, LookupError) as error:
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
        model_settings = build_settings(SETTINGS_CLASSES[key], metadata[key])
        return model_settings, build_settings(DiffusionSettings, metadata["diffusion"])
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"`checkpoint` must contain valid settings of sagl, but those in {path} are not.") from error


def build_settings(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Build a settings object from values of a file.

    Raises:
        UserError: A value is not allowed, or a fraction stands in place of an integer.
        TypeError: The values are of other types, or have other names.
    """
    for name, hint in get_type_hints(cls).items():
        value = values.get(name)
        fractional = isinstance(value, float) and hint in (int, int | None)
        require(not fractional, f"`{name}` must be an integer, got {value}.")
    try:
        return cls(**values)
    except UserError:
        raise
    except (ValueError, OverflowError) as error:
        raise TypeError(str(error)) from error


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
