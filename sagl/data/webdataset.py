"""WebDataset shards: tar files of pictures and labels, from paths or from the network.

Read through webdataset they would come as a stream, shared out by shard, in which a stopped training cannot go on.
Here the headers of each tar are read once, and offsets are kept in the cache folder; then pictures are read at random,
and order, resuming, ranks and workers are those of all other data.
"""

import hashlib
import os
import sys
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset.tariterators import base_plus_ext

from sagl.data.folder import ENDINGS
from sagl.data.image_data import NO_LABEL, ImageDataModule, Source
from sagl.data.webdataset_files import BLOCK, require_tar, shard_files
from sagl.errors import require
from sagl.utils.files import atomic_file, cache_folder

LABEL = ".cls"
"""Ending of the members that hold a label, as text."""
Index = np.ndarray[tuple[int, int], np.dtype[np.int64]]
"""A row a picture: offset and length in its shard, label."""
Members = dict[str, dict[str, tarfile.TarInfo]]
"""Of a shard, by key and by ending."""


class ShardImageSource(Source):
    """All pictures of some shards, in the order of the shards and of their members."""

    def __init__(self, shards: list[Path]) -> None:
        """Index them, or take their indices from the cache.

        Raises:
            UserError: one is no tar file or has a label that is none; some pictures have labels and others none.
        """
        indices = [_index(shard) for shard in shards]
        self.shards, self.index = shards, np.concatenate(indices)
        self._ends = np.cumsum([len(index) for index in indices])
        require(
            len(self) > 0,
            f"`data.shards` must hold pictures ({', '.join(sorted(ENDINGS))}), and {shards[0]} … has none.",
        )
        unlabelled = np.flatnonzero(self.index[:, 2] == NO_LABEL)
        self.num_classes = int(self.index[:, 2].max()) + 1 or None
        require(
            self.num_classes is None or len(unlabelled) == 0,
            f"`data.shards` must have labels ({LABEL}) for all pictures or for none, and {len(unlabelled)} of "
            f"{len(self)} have none, the first of them {len(unlabelled) and self.name(int(unlabelled[0]))}.",
        )

    def __len__(self) -> int:
        """Of all shards."""
        return len(self.index)

    def encoded(self, index: int) -> bytes:
        """The member's bytes. The file is opened for each: microseconds, and nothing open for a process to inherit."""
        offset, length, _ = self.index[index]
        with self._shard(index).open("rb", buffering=0) as file:
            return _read(file, offset, length)

    def label(self, index: int) -> int:
        """From the member beside it."""
        return int(self.index[index, 2])

    def name(self, index: int) -> str:
        """Its member, from the header before it, and the shard."""
        shard = self._shard(index)
        with shard.open("rb") as file:
            head = _read(file, self.index[index, 0] - BLOCK, BLOCK)
        return f"{tarfile.TarInfo.frombuf(head, 'utf-8', 'replace').name} in {shard}"

    def _shard(self, index: int) -> Path:
        return self.shards[int(np.searchsorted(self._ends, index, side="right"))]


@dataclass(kw_only=True, eq=False)
class ShardData(ImageDataModule):
    """Pictures and labels of WebDataset shards."""

    shards: str | list[str]
    """Path, folder, glob, brace range (cat-{000000..000163}.tar) or http(s) address of tar files, or a list."""
    cache: str | None = None
    """Folder for what is fetched from the network; by default in the cache folder."""

    def prepare_data(self) -> None:
        """Fetch and index the shards, once a machine."""
        self.source()

    def source(self) -> ShardImageSource:
        """The shards' pictures."""
        cache = Path(self.cache).expanduser() if self.cache else cache_folder() / "shards"
        return ShardImageSource(shard_files(self.shards, cache))


# ------------------------------------------------------------------------------------------------------- index


def _index(shard: Path) -> Index:
    """Of one shard, from the cache where it is known by place, size and time; else all its headers are read."""
    stat = shard.stat()
    said = f"{shard.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    kept = cache_folder() / "shards" / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.npy"
    if not kept.is_file():
        index = _read_index(shard)
        with atomic_file(kept, "SAGL_CACHE") as partial, partial.open("wb") as file:
            np.save(file, index)
    loaded: Index = np.load(kept)
    return loaded


def _read_index(shard: Path) -> Index:
    """Of the pictures whose members are whole; the user is told where others are missing."""
    require_tar(shard)
    with shard.open("rb") as file:
        members, whole = _members(file)
        rows = [_row(file, of_key) for of_key in members.values() if _picture(of_key)]
    if not whole:
        print(f"{shard} is damaged: it ends too soon. Its {len(rows)} whole pictures are used.", file=sys.stderr)
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _members(file: BinaryIO) -> tuple[Members, bool]:
    """The whole members by key, as WebDataset groups them, and whether the shard has its end.

    A key whose members are cut is left out; so is the last of a damaged shard if it has fewer members than the first.
    """
    members: Members = {}
    end, size = 0, os.fstat(file.fileno()).st_size
    for member in _readable(file):
        key, ending = base_plus_ext(member.name)
        if member.offset_data + member.size > size:
            members.pop(key, None)
            break
        end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        if member.isreg() and key:
            members.setdefault(key, {}).setdefault(f".{ending.lower()}", member)
    if whole := _read(file, end, BLOCK) == bytes(BLOCK):  # the mark of a tar's end
        return members, whole
    if members and len(members[last := next(reversed(members))]) < len(next(iter(members.values()))):
        del members[last]
    return members, whole


def _readable(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Members up to where the file is cut, or no tar any more."""
    with suppress(tarfile.ReadError), tarfile.open(fileobj=file, mode="r:") as tar:
        yield from tar


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _picture(of_key: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    return next((member for ending, member in of_key.items() if ending in ENDINGS), None)


def _row(file: BinaryIO, of_key: dict[str, tarfile.TarInfo]) -> tuple[int, int, int]:
    """Where the picture of a key is, and its label."""
    picture = _picture(of_key)
    assert picture is not None  # other keys have no row
    label = _label(file, of_key[LABEL]) if LABEL in of_key else NO_LABEL
    return picture.offset_data, picture.size, label


def _label(file: BinaryIO, member: tarfile.TarInfo) -> int:
    """The number in a member."""
    text = _read(file, member.offset_data, min(member.size, BLOCK)).decode(errors="replace").strip()
    require(
        text.isdecimal() and len(text) < 10,
        f"`data.shards` must hold labels as whole numbers from 0, and {member.name} in {file.name} holds "
        f"{text[:40]!r}.",
    )
    return int(text)
