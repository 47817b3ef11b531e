"""A sampling run on disk: run.json, images/, the npz that public evaluators read, and grid.png."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from sagl.data.pixels import to_rgb
from sagl.settings.errors import UserError, require
from sagl.shapes import ImageUint8

RECORD = "run.json"


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a finished run; empty where there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(
            f"`output` must hold a whole {RECORD}, and {path} is damaged. Delete it to start again."
        ) from error


def is_complete(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder holds a finished run of just these settings.

    Raises:
        UserError: it holds a run of other settings; names the first that differs.
    """
    found = read_record(folder).get("settings", {})
    asked = json.loads(json.dumps(settings))
    for name in asked if found else ():
        require(
            found.get(name) == asked[name],
            f"`output` {folder} holds a run with {name} {found.get(name)!r}, got {asked[name]!r}. "
            "Choose another folder, or delete this one.",
        )
    return bool(found)


def write_run(
    folder: Path, images_uint8: ImageUint8, labels: Sequence[int], record: Mapping[str, Any], first_id: int = 0
) -> Path:
    """Write images and record; the record comes last, so that a folder with one is a finished run.

    Args:
        folder: made where it is missing.
        images_uint8: (N, 1 or 3, H, W); grey images are written as RGB.
        labels: (N,), -1 for no label.
        record: what run.json holds.
        first_id: id of the first image, which names its file.

    Returns:
        The npz: `arr_0` uint8 (N, H, W, 3), `arr_1` int64 labels.
    """
    pixels = to_rgb(images_uint8).permute(0, 2, 3, 1).contiguous().numpy()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pixels):
        PILImage.fromarray(picture).save(folder / "images" / f"{first_id + i:06d}.png")
    npz = folder / f"samples_{'x'.join(map(str, pixels.shape))}.npz"
    with _partial(npz).open("wb") as file:
        np.savez(file, arr_0=pixels, arr_1=np.asarray(labels, dtype=np.int64))
    os.replace(_partial(npz), npz)
    _partial(folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    os.replace(_partial(folder / RECORD), folder / RECORD)
    return npz


def read_samples(path: Path) -> ImageUint8:
    """Images of a run folder or an npz: -> (N, 3, H, W) uint8.

    Raises:
        UserError: there are none.
    """
    import torch

    files = [path] if path.suffix == ".npz" else sorted(path.glob("samples_*.npz"))
    require(bool(files) and files[0].is_file(), f"`run` must be an npz file or a folder that holds one, got {path}.")
    with np.load(files[0]) as arrays:
        require("arr_0" in arrays, f"`run` must hold images as arr_0, and {files[0]} does not.")
        return torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
