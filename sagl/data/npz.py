"""Images and labels in arrays: npz files as `sagl export --npz` and public samplers write them."""

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from sagl.data.image_data import NO_LABEL, Array, ImageDataModule, ImageSource
from sagl.data.transforms import Pixels, to_pixels
from sagl.errors import UserError, require
from sagl.utils.archives import read_arrays


class ArrayImageSource(ImageSource):
    """Image source of arrays."""

    images: Array
    """(N, H, W, 1 or 3) uint8."""
    labels: Array
    """(N,) integers."""

    def __len__(self) -> int:
        return len(self.labels)

    def read_bytes(self, index: int) -> bytes:
        """Encode an image as PNG."""
        file = io.BytesIO()
        self.image(index).save(file, "PNG")
        return file.getvalue()

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def image(self, index: int) -> Image.Image:
        """Return an image as RGB, or greyscale if the array has one channel."""
        pixels = np.array(self.images[index])
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def pixels(self, index: int, channels: int) -> Pixels:
        return to_pixels(self.image(index), channels)


class NpzImageSource(ArrayImageSource):
    """Image source of an npz file with images `arr_0` and labels `arr_1`; images are read at first use."""

    def __init__(self, file: Path, *, argument: str = "data.file") -> None:
        """Read the labels, and check both arrays.

        Args:
            file: the npz file.
            argument: name of `file` in messages.

        Raises:
            UserError: there is no such file, or the arrays are not images and their labels.
        """
        require(file.is_file(), f"`{argument}` must be an npz file, and there is none at {file}.")
        self.file, self.argument = file, argument
        count = len(self.images)
        require(
            self.images.dtype == np.uint8 and self.images.ndim == 4 and self.images.shape[-1] in (1, 3) and count > 0,
            f"`{argument}` must hold uint8 images (N, H, W, 3 or 1), and arr_0 of {file} is {self.images.dtype} "
            f"{self.images.shape}.",
        )
        labels = self._read("arr_1")
        self.labels = np.full(count, NO_LABEL) if labels is None else labels
        require(
            np.issubdtype(self.labels.dtype, np.integer) and self.labels.shape == (count,),
            f"`{argument}` must hold {count} integers as arr_1, one label per image, and arr_1 of {file} is "
            f"{self.labels.dtype} {self.labels.shape}.",
        )
        lowest, num_unlabelled = int(self.labels.min()), int((self.labels == NO_LABEL).sum())
        require(
            lowest >= 0 or num_unlabelled == count,
            f"`{argument}` must hold labels from 0 for all images, or {NO_LABEL} for all, and arr_1 of {file} has "
            f"{num_unlabelled} of {count} at {NO_LABEL}, the lowest at {lowest}.",
        )
        self.num_classes = int(self.labels.max()) + 1 or None

    @cached_property
    def images(self) -> Array:  # type: ignore[override]
        """(N, H, W, C) uint8: memory-mapped if the file is not compressed."""
        images = self._read("arr_0")
        if images is None:
            raise UserError(f"`{self.argument}` must hold images as arr_0, and {self.file} does not.")
        return images

    def __getstate__(self) -> dict[str, Any]:
        """Leave the images out; another process reads them itself."""
        return {name: value for name, value in self.__dict__.items() if name != "images"}

    def name(self, index: int) -> str:
        return f"image {index} of {self.file}"

    def _read(self, name: str) -> Array | None:
        """Return an array of the file, or None if there is none of this name."""
        try:
            return read_arrays(self.file, [name]).get(name)
        except BadZipFile as error:
            raise UserError(f"`{self.argument}` must be an npz file, and {self.file} is damaged: {error}.") from error


@dataclass(kw_only=True, eq=False)
class NpzData(ImageDataModule):
    """Data module of an npz file."""

    file: str
    """npz file with arr_0 (N, H, W, 3 or 1) uint8 and, optionally, labels arr_1 (N,)."""

    def source(self) -> NpzImageSource:
        return NpzImageSource(Path(self.file))
