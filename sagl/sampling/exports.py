"""What is made of a run's shards for people and for other programs: grid, images, npz."""

import zipfile
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy

from sagl.errors import UserError, require
from sagl.sampling.grid import colorize_masks, image_grid, save_png
from sagl.sampling.run_folder import SAMPLES, Sample, iter_samples, pixels
from sagl.shapes import ImageUint8
from sagl.utils.files import atomic_file

GRID_SAMPLES = 256
"""A grid shows so many, the first of the run."""
ROWS = ("unguided", SAMPLES, "masks")
"""The rows of a grid, from above; those that the run has."""


def write_grid(run: Path, picture: Path, num_samples: int | None = None) -> None:
    """A PNG of the first images, with what was kept beside them above and below.

    Raises:
        UserError: the run is damaged or empty, or the file cannot be written.
    """
    samples = list(islice(iter_samples(run, num_samples), GRID_SAMPLES))
    require(bool(samples), f"`run` must hold images, and {run} holds none.")
    rows = [_row(samples, name) for name in ROWS if name in samples[0].pictures]
    with atomic_file(picture) as partial:
        save_png(image_grid(rows), partial)


def write_images(run: Path, folder: Path, num_samples: int | None = None) -> None:
    """One PNG a sample, named by its id, byte for byte as in the shards.

    Raises:
        UserError: the run is damaged, or the folder cannot be written.
    """
    try:
        for sample in iter_samples(run, num_samples):
            with atomic_file(folder / f"{sample.id:06d}.png") as partial:
                partial.write_bytes(sample.pictures[SAMPLES])
    except UserError:
        with suppress(OSError):  # a folder that holds nothing goes too
            folder.rmdir()
        raise


def write_npz(run: Path, file: Path, num_samples: int) -> None:
    """What public evaluators read: `arr_0` uint8 (N, H, W, 3), `arr_1` int64 labels, -1 for none. Streamed.

    Raises:
        UserError: the run is damaged or shorter than `num_samples`, or the file cannot be written.
    """
    labels: list[int] = []
    with atomic_file(file) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open(_member("arr_0"), "w", force_zip64=True) as stream:
            for sample in iter_samples(run, num_samples):
                image = pixels(sample.pictures[SAMPLES])
                if not labels:
                    _write_head(stream, np.dtype(np.uint8), (num_samples, *image.shape))
                stream.write(image.tobytes())
                labels.append(sample.label)
        require(len(labels) == num_samples, f"`run` must hold {num_samples} images, and {run} holds {len(labels)}.")
        with archive.open(_member("arr_1"), "w") as stream:
            _write_head(stream, np.dtype(np.int64), (num_samples,))
            stream.write(np.asarray(labels, dtype=np.int64).tobytes())


def npz_name(run: Path, num_samples: int) -> str:
    """The name that public tools expect: samples_NxHxWx3.npz."""
    shape = pixels(next(iter_samples(run, 1)).pictures[SAMPLES]).shape
    return f"samples_{'x'.join(map(str, (num_samples, *shape)))}.npz"


def _row(samples: Sequence[Sample], name: str) -> ImageUint8:
    row = torch.from_numpy(np.stack([pixels(sample.pictures[name]) for sample in samples])).permute(0, 3, 1, 2)
    return colorize_masks(row[:, :1].float() / 255) if name == "masks" else row


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that the same images give the same bytes


def _write_head(stream: IO[bytes], dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> None:
    npy.write_array_header_1_0(stream, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
