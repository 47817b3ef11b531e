"""WebDataset shards made of any source of pictures: the same bytes from the same pictures, whenever they are made."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from webdataset import TarWriter

from sagl.data.image_data import NO_LABEL, Source
from sagl.data.webdataset import ShardImageSource
from sagl.errors import UserError, require
from sagl.utils.files import atomic_file, sha256

RECORD = "shards.json"
"""What a whole folder of shards has beside them: each one's pictures and sha256."""
STARTS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp"}
"""What the files of each kind begin with."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file to be written."""

    path: Path
    pictures: range
    """Of the source."""


def planned(folder: Path, name: str, count: int, shard_size: int) -> list[Shard]:
    """Where `count` pictures go: NAME-000000.tar, NAME-000001.tar, …, `shard_size` pictures each."""
    return [
        Shard(path=folder / f"{name}-{number:06d}.tar", pictures=range(first, min(count, first + shard_size)))
        for number, first in enumerate(range(0, count, shard_size))
    ]


def write_shards(source: Source, shards: list[Shard], on_pictures: Callable[[int], None]) -> int:
    """Write those that are not there, and then the record of all.

    Args:
        source: of the pictures.
        shards: as `planned`.
        on_pictures: told how many more are done.

    Returns:
        How many shards were there, and were kept.

    Raises:
        UserError: a file is of other pictures, or cannot be written.
    """
    record: dict[str, dict[str, int | str]] = {}
    _require_no_others(shards)
    kept = [shard for shard in shards if shard.path.is_file()]
    for shard in kept:
        _require_same(source, shard)
    for shard in shards:
        if shard in kept:
            on_pictures(len(shard.pictures))
        else:
            _write(source, shard, on_pictures)
        record[shard.path.name] = {"pictures": len(shard.pictures), "sha256": sha256(shard.path)}
    with atomic_file(shards[0].path.with_name(RECORD)) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")
    return len(kept)


def ending(encoded: bytes) -> str:
    """What kind of file the bytes are: jpg where they do not say, so that a damaged picture keeps its place."""
    return next((kind for start, kind in STARTS.items() if encoded.startswith(start)), "jpg")


def _write(source: Source, shard: Shard, on_pictures: Callable[[int], None]) -> None:
    """One shard, whole or not at all. Owner, mode and time are the same for all."""
    with (
        atomic_file(shard.path) as partial,
        partial.open("wb") as file,
        TarWriter(file, user="root", group="root", mode=0o644, mtime=0, encoder=False) as tar,
    ):
        for index in shard.pictures:
            tar.write(_sample(source, index))
            on_pictures(1)


def _sample(source: Source, index: int) -> dict[str, str | bytes]:
    """A picture and its label under a key of nine digits: its place in the source."""
    try:
        encoded, label = source.encoded(index), source.label(index)
    except OSError as error:
        raise UserError(
            f"`source` must be pictures that can be read, and {source.name(index)} is not: {error.strerror}."
        ) from error
    text = {} if label == NO_LABEL else {"cls": str(label).encode()}
    return {"__key__": f"{index:09d}", ending(encoded): encoded, **text}


def _require_no_others(shards: list[Shard]) -> None:
    """Refuse a folder with shards that would be taken for some of these."""
    folder, mine = shards[0].path.parent, {shard.path for shard in shards}
    others = [path for path in sorted(folder.glob("*.tar")) if path not in mine]
    require(
        not others,
        f"`output` must be a new folder or hold shards of the same pictures, and {folder} also holds "
        f"{others and others[0].name}. Choose another folder.",
    )


def _require_same(source: Source, shard: Shard) -> None:
    """Refuse a shard of as many other pictures: how many, the first and the last are compared."""
    wanted = shard.pictures
    there = ShardImageSource([shard.path])
    same = len(there) == len(wanted) and all(
        there.encoded(place) == source.encoded(wanted[place]) and there.label(place) == source.label(wanted[place])
        for place in {0, len(wanted) - 1}
    )
    require(
        same,
        f"`output` must be a new folder or hold shards of the same pictures, and {shard.path} holds others or is "
        "damaged. Choose another folder, or delete it.",
    )
