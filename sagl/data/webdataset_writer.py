"""Writing of WebDataset shards. The same images always give the same bytes."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from sagl.data.image_data import NO_LABEL, ImageSource
from sagl.data.webdataset_files import MANIFEST
from sagl.errors import UserError, require
from sagl.utils.files import atomic_file, remove_partial, sha256

MAGIC_BYTES = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp"}
"""First bytes of image files, with the suffix of their format."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A tar file and the images that it holds."""

    path: Path
    indices: range
    """Indices of the images in the source."""


def plan_shards(folder: Path, name: str, num_images: int, shard_size: int) -> list[Shard]:
    """Split images between the shards NAME-000000.tar, NAME-000001.tar, … with `shard_size` images each."""
    return [
        Shard(path=folder / f"{name}-{number:06d}.tar", indices=range(first, min(num_images, first + shard_size)))
        for number, first in enumerate(range(0, num_images, shard_size))
    ]


def write_shards(source: ImageSource, shards: list[Shard], on_images: Callable[[int], None]) -> int:
    """Write the shards that do not exist, then the manifest.

    Args:
        source: source of the images.
        shards: shards from `plan_shards`.
        on_images: progress callback; receives the number of images completed since its last call.

    Returns:
        The number of shards that existed.

    Raises:
        UserError: the folder holds shards of other images, an image cannot be read, or a file cannot be written.
    """
    _check_folder(shards)
    remove_partial(shards[0].path.parent, "*.tar.*", f"{MANIFEST}.*")
    existing = [shard for shard in shards if shard.path.is_file()]
    for shard in existing:
        _check_shard(source, shard, on_images)
    manifest: dict[str, dict[str, int | str]] = {}
    for shard in shards:
        if shard not in existing:
            with atomic_file(shard.path) as partial, partial.open("wb") as file:
                _write(source, shard, file, on_images)
        manifest[shard.path.name] = {"images": len(shard.indices), "sha256": sha256(shard.path)}
    with atomic_file(shards[0].path.with_name(MANIFEST)) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n")
    return len(existing)


class _Sha256(io.RawIOBase):
    """Binary stream that computes the sha256 of what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.digest.update(data)
        return len(data)


def _check_shard(source: ImageSource, shard: Shard, on_images: Callable[[int], None]) -> None:
    """Refuse an existing shard that is not the one that would be written."""
    stream = _Sha256()
    _write(source, shard, stream, on_images)
    require(
        stream.digest.hexdigest() == sha256(shard.path),
        f"`output` must be a new folder or hold shards of the same images and labels, and {shard.path} holds others or "
        "is damaged. Delete it to write it again, or choose another folder.",
    )


def _write(source: ImageSource, shard: Shard, stream: Any, on_images: Callable[[int], None]) -> None:  # noqa: ANN401
    """Write a tar file to a binary stream, with constant owner, mode and time."""
    with TarWriter(stream, user="root", group="root", mode=0o644, mtime=0, encoder=False) as tar:
        for index in shard.indices:
            tar.write(_sample(source, index))
            on_images(1)


def _sample(source: ImageSource, index: int) -> dict[str, str | bytes]:
    """Return an image and its label under a key of nine digits, the index of the image."""
    try:
        image, label = source.read_bytes(index), source.label(index)
    except OSError as error:
        raise UserError(
            f"`source` must contain readable images, and {source.name(index)} is not readable: {error.strerror}."
        ) from error
    # A corrupt image without a known format is written as jpg, so that the other images keep their indices.
    suffix = next((suffix for magic, suffix in MAGIC_BYTES.items() if image.startswith(magic)), "jpg")
    label_member = {} if label == NO_LABEL else {"cls": str(label).encode()}
    return {"__key__": f"{index:09d}", suffix: image, **label_member}


def _check_folder(shards: list[Shard]) -> None:
    """Refuse a folder that holds other tar files."""
    folder, paths = shards[0].path.parent, {shard.path for shard in shards}
    others = [path.name for path in sorted(folder.glob("*.tar")) if path not in paths]
    require(
        not others,
        f"`output` must be a new folder or hold shards of the same images, and {folder} also holds "
        f"{others and others[0]}. Choose another folder.",
    )
