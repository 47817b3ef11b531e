"""Images and labels of an npz file, as `sagl export --npz` and public samplers write them."""

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from sagl.data.array_source import Array, ArrayImageSource
from sagl.data.image_data import NO_LABEL, ImageDataModule
from sagl.errors import UserError, require

LOCAL_HEADER = struct.Struct("<26x2H")
"""The end of what stands before a member's name in a zip: lengths of the name and of the extra field."""


class NpzImageSource(ArrayImageSource):
    """`arr_0` as pictures and `arr_1` as labels; each process reads the images when it first needs one."""

    def __init__(self, file: Path) -> None:
        """Look at the arrays.

        Raises:
            UserError: there is no such file, or it holds no images, or labels that do not belong to them.
        """
        require(file.is_file(), f"`data.file` must be an npz file, and there is none at {file}.")
        self.file = file
        images, labels = self.images, _read(file, "arr_1")
        require(
            images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3) and len(images) > 0,
            f"`data.file` must hold uint8 images (N, H, W, 3 or 1), and arr_0 of {file} is {images.dtype} "
            f"{images.shape}.",
        )
        self.labels = np.full(len(images), NO_LABEL) if labels is None else labels
        _require_labels(self.labels, len(images), file)
        self.num_classes = int(self.labels.max()) + 1 or None

    @cached_property
    def images(self) -> Array:
        """(N, H, W, C) uint8: mapped from the disk where they are stored as they are, otherwise in memory."""
        images = _read(self.file, "arr_0")
        require(images is not None, f"`data.file` must hold images as arr_0, and {self.file} does not.")
        assert images is not None
        return images

    def __getstate__(self) -> dict[str, Any]:
        """Without the images, which another process reads for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "images"}

    def name(self, index: int) -> str:
        """Its place, and the file."""
        return f"image {index} of {self.file}"


@dataclass(kw_only=True, eq=False)
class NpzData(ImageDataModule):
    """Images of an npz file."""

    file: str
    """With arr_0 (N, H, W, 3 or 1) uint8 and, if there are labels, arr_1 (N,)."""

    def source(self) -> NpzImageSource:
        """The file's images."""
        return NpzImageSource(Path(self.file))


def _require_labels(labels: Array, count: int, file: Path) -> None:
    require(
        np.issubdtype(labels.dtype, np.integer) and labels.shape == (count,),
        f"`data.file` must hold {count} whole numbers as arr_1, a label an image, and that of {file} is "
        f"{labels.dtype} {labels.shape}.",
    )
    lowest, unlabelled = int(labels.min()), int((labels == NO_LABEL).sum())
    require(
        lowest >= 0 or unlabelled == count,
        f"`data.file` must hold labels from 0 for all images, or {NO_LABEL} for all, and arr_1 of {file} has "
        f"{unlabelled} of {count} at {NO_LABEL}, the lowest at {lowest}.",
    )


def _read(file: Path, name: str) -> Array | None:
    """An array of the file; None where it has none of this name.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type == zipfile.ZIP_STORED:
                return _mapped(file, member)
            with archive.open(member) as stream:
                return npy.read_array(stream, allow_pickle=False)
    except (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"`data.file` must be a whole npz file, and {file} is damaged or none: {error}.") from error


def _mapped(file: Path, member: zipfile.ZipInfo) -> Array:
    """A member that is stored uncompressed, on the disk: behind the zip's header and its own."""
    with file.open("rb") as stream:
        stream.seek(member.header_offset)
        stream.seek(sum(LOCAL_HEADER.unpack(stream.read(LOCAL_HEADER.size))), io.SEEK_CUR)
        shape, fortran_order, dtype = _head(stream)
        require(not dtype.hasobject, f"{member.filename} holds Python objects")
        array = np.memmap(file, dtype, "r", stream.tell(), shape[::-1] if fortran_order else shape)
        return array.T if fortran_order else array


def _head(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, "np.dtype[Any]"]:
    """Shape, whether the first index runs fastest, and kind of an array, from the head of an npy file."""
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(stream)]
    return read(stream)
