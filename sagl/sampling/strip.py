"""A chain in pictures: the estimate of the clean image, and what was masked, from noise to image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image as PILImage

from sagl.sampling.grid import colorize_masks, image_grid, save_png
from sagl.shapes import ImageUint8, Mask
from sagl.utils.files import atomic_file
from sagl.utils.images import to_rgb

GIF_MILLISECONDS = 250
"""How long a frame is shown; the last one ten times as long."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One step of a few chains."""

    step: int
    """Position in the chain, 0 the cleanest."""
    x0_hat: ImageUint8
    """(B, C, H, W), the estimate of the clean image."""
    mask: Mask | None
    """(B, 1, H, W) bool, what was degraded; None where the step was not guided."""


def kept_steps(num_steps: int, columns: int = 10) -> list[int]:
    """Steps to show, evenly spread from the noisiest to the cleanest, both included."""
    columns = min(columns, num_steps)
    return sorted({round(k * (num_steps - 1) / max(1, columns - 1)) for k in range(columns)}, reverse=True)


def write_strip(frames: Sequence[Frame], folder: Path) -> None:
    """strip.png: time to the right, each sample's estimates above its masks; strip.gif: the samples beside each other.

    Raises:
        UserError: a file cannot be written.
    """
    masked = any(frame.mask is not None for frame in frames)
    rows: list[ImageUint8] = []
    for i in range(len(frames[0].x0_hat)):
        rows.append(torch.cat([to_rgb(frame.x0_hat[i : i + 1]) for frame in frames]))
        rows += [torch.cat([_mask(frame)[i : i + 1] for frame in frames])] if masked else []
    with atomic_file(folder / "strip.png") as partial:
        save_png(image_grid(rows, columns=len(frames)), partial)
    pictures = [image_grid([to_rgb(f.x0_hat), *([_mask(f)] if masked else [])]) for f in frames]
    images = [PILImage.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    shown = [GIF_MILLISECONDS] * (len(images) - 1) + [10 * GIF_MILLISECONDS]
    with atomic_file(folder / "strip.gif") as partial:
        images[0].save(partial, format="GIF", save_all=True, append_images=images[1:], duration=shown, loop=0)


def _mask(frame: Frame) -> ImageUint8:
    share = frame.x0_hat.new_zeros(frame.x0_hat[:, :1].shape) if frame.mask is None else frame.mask
    return colorize_masks(share.float())
