"""Exports of a run's shards: image grid, single images, npz file, denoising strip."""

import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image as PILImage
from torch import Tensor

from sagl.errors import UserError, require
from sagl.sampling.pipeline import SamplingPipeline, make_labels, x0_predictions
from sagl.sampling.run_folder import SAMPLES, Sample, decode_png, iter_samples
from sagl.settings.sampling import RunSettings
from sagl.shapes import ImageUint8, Mask
from sagl.utils.files import atomic_file, remove_partial
from sagl.utils.images import image_grid, save_png, to_rgb, to_uint8

GRID_SAMPLES = 256
"""Largest number of samples in a grid."""
GRID_ROWS = ("unguided", SAMPLES, "masks")
"""Rows of a grid from top to bottom; a run without `compare` has only the samples."""
STRIP_SAMPLES = 4
"""Number of samples in a denoising strip."""
GIF_MILLISECONDS = 250
"""Duration of a frame of the denoising strip; the last one lasts ten times as long."""


# ------------------------------------------------------------------------------------------- grid, images, npz


def write_grid(run: Path, file: Path, num_samples: int | None = None, argument: str = "output") -> None:
    """Write a PNG of the first samples of a run, between the unguided images and the masks if the run has them.

    Raises:
        UserError: the run is damaged or empty, or the file cannot be written (names `argument`).
    """
    samples = list(islice(iter_samples(run, num_samples), GRID_SAMPLES))
    require(bool(samples), f"`run` must hold images, and {run} holds none.")
    rows = [_grid_row(samples, name) for name in GRID_ROWS if name in samples[0].pngs]
    with atomic_file(file, argument) as partial:
        save_png(image_grid(rows), partial)


def write_images(run: Path, folder: Path, num_samples: int | None = None, argument: str = "output") -> None:
    """Write one PNG per sample, named by its id, with the bytes of the shards.

    Raises:
        UserError: the run is damaged, or the folder cannot be written (names `argument`).
    """
    remove_partial(folder, "*.png.*")
    try:
        for sample in iter_samples(run, num_samples):
            with atomic_file(folder / f"{sample.id:06d}.png", argument) as partial:
                partial.write_bytes(sample.pngs[SAMPLES])
    except UserError:
        with suppress(OSError):  # not empty
            folder.rmdir()
        raise


def require_no_other_images(run: Path, folder: Path, num_samples: int | None, argument: str) -> None:
    """Refuse a folder with PNG files that `write_images` would leave among those of a run.

    Raises:
        UserError: it has some (names `argument`).
    """
    if others := {path.name for path in folder.glob("*.png")}:
        others -= {f"{sample.id:06d}.png" for sample in iter_samples(run, num_samples)}
    require(
        not others,
        f"`{argument}` must be a folder without other images, and {folder} has {min(others, default='')}. Delete them, "
        "or choose another folder.",
    )


def write_npz(run: Path, file: Path, num_samples: int, argument: str = "output") -> None:
    """Write the npz file that public evaluators read; one shard at a time is in memory.

    Its arrays are `arr_0`, (N, H, W, 3) uint8, and `arr_1`, (N,) int64 labels, -1 for none.

    Raises:
        UserError: the run is damaged or has fewer samples, or the file cannot be written (names `argument`).
    """
    labels: list[int] = []
    with atomic_file(file, argument) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open(_member("arr_0"), "w", force_zip64=True) as stream:
            for sample in iter_samples(run, num_samples):
                image = decode_png(sample.pngs[SAMPLES])
                if not labels:
                    _write_header(stream, np.dtype(np.uint8), (num_samples, *image.shape))
                stream.write(image.tobytes())
                labels.append(sample.label)
        require(len(labels) == num_samples, f"`run` must hold {num_samples} images, and {run} holds {len(labels)}.")
        with archive.open(_member("arr_1"), "w") as stream:
            _write_header(stream, np.dtype(np.int64), (num_samples,))
            stream.write(np.asarray(labels, dtype=np.int64).tobytes())


def npz_name(run: Path, num_samples: int) -> str:
    """Return the file name that public tools expect: samples_NxHxWx3.npz."""
    shape = decode_png(next(iter_samples(run, 1)).pngs[SAMPLES]).shape
    return f"samples_{'x'.join(map(str, (num_samples, *shape)))}.npz"


def _grid_row(samples: Sequence[Sample], name: str) -> ImageUint8:
    row = torch.from_numpy(np.stack([decode_png(sample.pngs[name]) for sample in samples])).permute(0, 3, 1, 2)
    return colorize_masks(row[:, :1].float() / 255) if name == "masks" else row


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that the same images give the same bytes


def _write_header(stream: IO[bytes], dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> None:
    npy.write_array_header_1_0(stream, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})


# ---------------------------------------------------------------------------------------- masks, denoising strip


def colorize_masks(mask_frequency: Tensor) -> ImageUint8:
    """Color the fraction of guided steps in which a pixel was masked: (B, 1, H, W) in [0, 1] -> (B, 3, H, W) uint8.

    The colors go from black (never) over dark blue and orange to white (always).
    """
    stops = torch.tensor([[0, 0, 0], [38, 42, 110], [222, 120, 40], [255, 255, 255]], dtype=torch.float32)
    position = mask_frequency.clamp(0, 1) * (len(stops) - 1)
    below = position.floor().long().clamp(max=len(stops) - 2)
    color = torch.lerp(stops[below], stops[below + 1], (position - below)[..., None])
    return color[:, 0].permute(0, 3, 1, 2).round().to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One sampling step of a few samples."""

    x0_hat: ImageUint8
    """Estimate of the clean images, (B, C, H, W)."""
    mask: Mask | None
    """Degraded pixels, (B, 1, H, W) bool; None if the step was not guided."""


def evenly_spaced_steps(num_steps: int, count: int = 10) -> list[int]:
    """Return `count` steps from the noisiest to the cleanest, both included."""
    count = min(count, num_steps)
    return sorted({round(k * (num_steps - 1) / max(1, count - 1)) for k in range(count)}, reverse=True)


def write_strip(pipeline: SamplingPipeline, samples: RunSettings, folder: Path) -> None:
    """Sample the first images of a run again, and write the denoising strip.

    Raises:
        UserError: a file cannot be written.
    """
    ids = list(range(samples.first_id, samples.first_id + min(STRIP_SAMPLES, samples.num_samples)))
    steps = evenly_spaced_steps(pipeline.schedule.num_steps)
    with torch.inference_mode():
        frames = [
            Frame(x0_hat=to_uint8(x0_hat).cpu(), mask=None if mask is None else mask.cpu())
            for step, x0_hat, mask in x0_predictions(
                pipeline, samples.seed, ids, make_labels(samples, ids, pipeline.network)
            )
            if step in steps
        ]
    draw_strip(frames, folder)


def draw_strip(frames: Sequence[Frame], folder: Path) -> None:
    """Write estimates of x_0 above their masks, from noise to image.

    strip.png has time to the right and one pair of rows per sample; strip.gif has the samples side by side.

    Raises:
        UserError: a file cannot be written.
    """
    has_masks = any(frame.mask is not None for frame in frames)
    rows: list[ImageUint8] = []
    for i in range(len(frames[0].x0_hat)):
        rows.append(torch.cat([to_rgb(frame.x0_hat[i : i + 1]) for frame in frames]))
        rows += [torch.cat([_mask_image(frame)[i : i + 1] for frame in frames])] if has_masks else []
    with atomic_file(folder / "strip.png") as partial:
        save_png(image_grid(rows, columns=len(frames)), partial)
    grids = [image_grid([to_rgb(frame.x0_hat), *([_mask_image(frame)] if has_masks else [])]) for frame in frames]
    images = [PILImage.fromarray(grid.permute(1, 2, 0).numpy()) for grid in grids]
    durations = [GIF_MILLISECONDS] * (len(images) - 1) + [10 * GIF_MILLISECONDS]
    with atomic_file(folder / "strip.gif") as partial:
        images[0].save(partial, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def _mask_image(frame: Frame) -> ImageUint8:
    mask = frame.x0_hat.new_zeros(frame.x0_hat[:, :1].shape) if frame.mask is None else frame.mask
    return colorize_masks(mask.float())
