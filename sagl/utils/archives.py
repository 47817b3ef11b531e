"""Zip archives (.ckpt, .pt, .npz): nothing is used of a file that does not match its own checksums.

Neither torch.load nor a memory map compares them. The comparison reads the file once, at some GB per second.
"""

import math
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
from numpy.lib import format as npy

LOCAL_HEADER = struct.Struct("<26x2H")
"""Fixed part of the header of a zip member; its last fields are the lengths of the name and of the extra field."""
MAX_RATIO = 1032
"""Largest number of bytes for which a byte of a deflated member can stand."""
CHUNK = 1 << 20
Array = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")


def check_archive(path: Path) -> None:
    """Compare every member of an archive with its checksum.

    Raises:
        BadZipFile: A member differs, or the file is not an archive.
    """

    def check(archive: ZipFile) -> None:
        for member in archive.infolist():
            _check(archive, member)

    _open(path, check)


def array_names(path: Path) -> list[str]:
    """Return the names of the arrays in an npz file.

    Raises:
        BadZipFile: The file is not an archive.
    """
    return _open(path, lambda archive: [name.removesuffix(".npy") for name in archive.namelist()])


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, Array]:
    """Return those of the named arrays that an npz file has; arrays that are not compressed are memory-mapped.

    Raises:
        BadZipFile: The file is damaged, or an array holds Python objects.
    """

    def read(archive: ZipFile) -> dict[str, Array]:
        members = {name: f"{name}.npy" for name in names if f"{name}.npy" in archive.namelist()}
        return {name: _read_array(path, archive, archive.getinfo(member)) for name, member in members.items()}

    return _open(path, read)


def _open(path: Path, use: Callable[[ZipFile], T]) -> T:
    try:
        with ZipFile(path) as archive:
            return use(archive)
    except Exception as error:  # zipfile, zlib and the parser of npy headers raise many types
        raise BadZipFile(str(error) or type(error).__name__) from error


def _check(archive: ZipFile, member: ZipInfo) -> None:
    _check_sizes(member)
    with archive.open(member) as stream:
        while stream.read(CHUNK):  # the last read compares the checksum
            pass


def _check_sizes(member: ZipInfo) -> None:
    """Refuse a size that the compressed bytes cannot stand for, before memory is requested for it."""
    largest = {ZIP_STORED: 1, ZIP_DEFLATED: MAX_RATIO}.get(member.compress_type, 0) * member.compress_size
    if member.file_size > largest:
        raise BadZipFile(f"{member.filename} cannot have {member.file_size} bytes")


def _read_array(path: Path, archive: ZipFile, member: ZipInfo) -> Array:
    _check_sizes(member)
    with archive.open(member) as stream:
        shape, fortran_order, dtype = _read_npy_header(stream)
        offset = stream.tell()
        if dtype.hasobject or offset + math.prod(shape) * dtype.itemsize != member.file_size:
            raise BadZipFile(f"{member.filename} holds Python objects, or not as many bytes as its header says")
        if member.compress_type == ZIP_DEFLATED:
            stream.seek(0)
            array: Array = npy.read_array(stream, allow_pickle=False)
            return array
    _check(archive, member)
    with path.open("rb") as file:
        file.seek(member.header_offset)
        offset += member.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size)))
    mapped = np.memmap(path, dtype, "r", offset, shape[::-1] if fortran_order else shape)
    return mapped.T if fortran_order else mapped


def _read_npy_header(stream: Any) -> tuple[tuple[int, ...], bool, "np.dtype[Any]"]:  # noqa: ANN401 (a binary file)
    """Return the shape, whether the order is Fortran's, and the dtype."""
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(stream)]
    return read(stream)
