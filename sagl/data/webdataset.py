"""WebDataset shards: tar files of images and labels, from paths or URLs.

webdataset reads shards as a stream and splits them between workers by shard; an interrupted training cannot continue in
the middle of such a stream. Here the headers of each tar file are read once and the offsets are stored in the cache
folder. Images are then read in any order, so that shuffling, resuming, ranks and workers are those of all other data.
"""

import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from posixpath import dirname, join, normpath, splitext
from typing import BinaryIO

import numpy as np
from webdataset.tariterators import base_plus_ext

from sagl.data.folder import IMAGE_SUFFIXES
from sagl.data.image_data import NO_LABEL, Array, ImageDataModule, ImageSource, cached_index
from sagl.data.webdataset_files import BLOCK_SIZE, check_manifest, check_tar, shard_files
from sagl.errors import UserError, require, whole_number
from sagl.utils.files import cache_folder
from sagl.utils.listing import is_hidden

LABEL_SUFFIX = ".cls"
"""Suffix of the members that hold a label as text."""
Members = dict[str, dict[str, tarfile.TarInfo]]
"""Members of a shard by key and by suffix."""


class ShardImageSource(ImageSource):
    """Image source of WebDataset shards, in the order of the shards and of their members."""

    def __init__(self, shards: list[Path], *, argument: str = "data.shards") -> None:
        """Index the shards, or read their indices from the cache.

        Args:
            shards: tar files.
            argument: name of the shards in messages.

        Raises:
            UserError: a file is not a tar file, a label is not a number, or only some images have labels.
        """
        # (images, 3): offset, length, label
        indices = [cached_index(shard, "shards", partial(_index, shard, argument)) for shard in shards]
        self.shards, self.index = shards, np.concatenate(indices)
        self._ends = np.cumsum([len(index) for index in indices])
        require(
            len(self) > 0,
            f"`{argument}` must hold images ({', '.join(sorted(IMAGE_SUFFIXES))}), and {shards[0]} … has none.",
        )
        unlabelled = np.flatnonzero(self.index[:, 2] == NO_LABEL)
        self.num_classes = int(self.index[:, 2].max()) + 1 or None
        require(
            self.num_classes is None or len(unlabelled) == 0,
            f"`{argument}` must have labels ({LABEL_SUFFIX}) for all images or for none, and {len(unlabelled)} of "
            f"{len(self)} have none, the first of them {len(unlabelled) and self.name(int(unlabelled[0]))}.",
        )

    def __len__(self) -> int:
        return len(self.index)

    def read_bytes(self, index: int) -> bytes:
        """Read a member. The shard is opened each time, which takes microseconds and leaves no file to be inherited."""
        offset, length, _ = self.index[index]
        with self._shard(index).open("rb", buffering=0) as file:
            return _read(file, offset, length)

    def label(self, index: int) -> int:
        return int(self.index[index, 2])

    def name(self, index: int) -> str:
        """Return the name of the member, from the header before it, and of the shard; its index if it is unreadable."""
        shard = self._shard(index)
        try:
            with shard.open("rb") as file:
                header = _read(file, self.index[index, 0] - BLOCK_SIZE, BLOCK_SIZE)
            return f"{tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name} in {shard}"
        except (OSError, tarfile.TarError):
            return f"image {index} in {shard}"

    def _shard(self, index: int) -> Path:
        return self.shards[int(np.searchsorted(self._ends, index, side="right"))]


def open_shards(
    shards: str | Sequence[str], cache: Path | None = None, argument: str = "data.shards"
) -> ShardImageSource:
    """Return the images of shards given by paths or URLs; arguments as of `shard_files`."""
    files = shard_files(shards, cache or cache_folder() / "shards", argument)
    return ShardImageSource(files, argument=argument)


@dataclass(kw_only=True, eq=False)
class ShardData(ImageDataModule):
    """Data module of WebDataset shards."""

    shards: str | list[str]
    """Path, folder, glob, brace range (cat-{000000..000163}.tar) or http(s) URL of tar files, or a list of these."""
    cache: str | None = None
    """Folder for downloaded shards; by default in the cache folder."""

    def prepare_data(self) -> None:
        """Download and index the shards, once per machine."""
        self.source()

    def source(self) -> ShardImageSource:
        return open_shards(self.shards, Path(self.cache).expanduser() if self.cache else None)


def _index(shard: Path, argument: str) -> Array:
    """Index the images of a shard, (images, 3) int64: offset, length, label. Say what is left out."""
    check_tar(shard, argument)
    check_manifest(shard, argument)
    rows, used = [], set()
    with shard.open("rb") as file:
        members, complete = _read_members(file)
        members = [member for member in members if not member.isdir()]
        for key, by_suffix in _group(members, complete=complete).items():
            suffix = next((suffix for suffix in by_suffix if suffix in IMAGE_SUFFIXES), None)
            if suffix:
                image = by_suffix[suffix]
                label = by_suffix.get(LABEL_SUFFIX)
                label_value = _read_label(file, label, argument) if label else NO_LABEL
                rows.append((image.offset_data, image.size, label_value))
                used.add(f"{key}{suffix}")
    if not complete:
        print(f"{shard} is truncated. Its {len(rows)} complete images are used.", file=sys.stderr)
    names = [member.name for member in members if _suffix(member.name) in IMAGE_SUFFIXES]
    if complete and (num_unused := len(names) - len(rows)):
        first = next((name for name in names if f"{normpath(splitext(name)[0])}{_suffix(name)}" not in used), names[-1])
        print(f"{shard}: left out {num_unused} of {len(names)} images, the first of them {first}.", file=sys.stderr)
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _read_members(file: BinaryIO) -> tuple[list[tarfile.TarInfo], bool]:
    """Return the complete members, and whether the shard is complete.

    In a truncated shard, those with the key of the truncated member are left out.
    """
    members: list[tarfile.TarInfo] = []
    end, file_size = 0, os.fstat(file.fileno()).st_size
    for member in _iter_members(file):
        size = member.size if member.isreg() else 0
        if member.offset_data + size > file_size:
            key = base_plus_ext(member.name)[0]
            return [other for other in members if base_plus_ext(other.name)[0] != key], False
        members.append(member)
        end = member.offset_data + -(-size // BLOCK_SIZE) * BLOCK_SIZE
    return members, _read(file, end, BLOCK_SIZE) == bytes(BLOCK_SIZE)  # a tar file ends with blocks of zeros


def _iter_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Iterate over the members up to the first unreadable header."""
    with suppress(tarfile.ReadError), tarfile.open(fileobj=file, mode="r:") as tar:
        yield from tar


def _group(members: list[tarfile.TarInfo], *, complete: bool) -> Members:
    """Return the members by key and suffix, as WebDataset groups them; links are followed, hidden files left out.

    In a truncated shard, the last key is left out if it has fewer members than the first.
    """
    by_path = {normpath(member.name): member for member in members if member.isreg() and not member.issparse()}
    groups: Members = {}
    for member in members:
        link = {tarfile.LNKTYPE: member.linkname, tarfile.SYMTYPE: join(dirname(member.name), member.linkname)}
        target = by_path.get(normpath(link.get(member.type, member.name)))
        key, suffix = base_plus_ext(member.name)
        if target and key and not any(map(is_hidden, normpath(member.name).split("/"))):
            groups.setdefault(normpath(key), {}).setdefault(f".{suffix.lower()}", target)
    if not complete and groups and len(groups[next(reversed(groups))]) < len(next(iter(groups.values()))):
        groups.popitem()
    return groups


def _suffix(name: str) -> str:
    return splitext(name)[1].lower()


def _read_label(file: BinaryIO, member: tarfile.TarInfo, argument: str) -> int:
    text = _read(file, member.offset_data, min(member.size, BLOCK_SIZE)).decode(errors="replace").strip()
    label = whole_number(text)
    if label is None or len(text) > 9:
        raise UserError(
            f"`{argument}` must hold labels as whole numbers from 0, and {member.name} in {file.name} holds "
            f"{text[:40]!r}."
        )
    return label


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)
