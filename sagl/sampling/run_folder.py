"""A sampling run on disk: run.json says what was asked, and shards/ holds the images, a micro-batch a file.

A shard is a tar of PNG files and one JSON a sample; its last member, index.json, has length and sha256 of the others.
WebDataset reads it (`select` what has a "png"). Shards are written whole or not at all, and nothing in them depends on
when, where or in how many goes the run was made. All else in the folder is made from them (`sagl.sampling.exports`).
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from sagl.errors import UserError, require
from sagl.utils.files import PARTIAL, atomic_file
from sagl.utils.run_lock import LOCK

RECORD, INDEX, SHARDS = "run.json", "index.json", "shards"
Pixels = npt.NDArray[np.uint8]
"""(H, W, 3) of an image."""
SAMPLES = "samples"
"""The row of images that a run is made for; others stand beside it for comparison."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of a run, and what was kept beside it."""

    id: int
    label: int
    """Its class; -1 for none."""
    seed: int
    """Of the run."""
    pictures: Mapping[str, bytes]
    """PNG files by row: "samples", and with --compare "unguided" and "masks"."""


# ------------------------------------------------------------------------------------------------------- shards


def png(image: Pixels) -> bytes:
    """One image as a PNG file: (H, W, 3) uint8 -> bytes."""
    file = io.BytesIO()
    PILImage.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def pixels(picture: bytes) -> Pixels:
    """A PNG file of a shard as (H, W, 3) uint8."""
    with PILImage.open(io.BytesIO(picture)) as opened:
        return np.asarray(opened.convert("RGB"))


def write_shard(folder: Path, samples: Sequence[Sample]) -> Path:
    """Samples of consecutive ids as shards/FIRST-LAST.tar: the same samples give the same bytes.

    Raises:
        UserError: it cannot be written; nothing is left of it.
    """
    path = folder / SHARDS / f"{samples[0].id:06d}-{samples[-1].id:06d}.tar"
    with atomic_file(path) as partial:
        partial.write_bytes(_tar(samples))
    return path


def read_shard(path: Path) -> list[Sample]:
    """The samples of a shard, in order of their ids. Every byte is checked: it must be what these samples give.

    Raises:
        UserError: the file is damaged; the same `sagl sample` makes it again.
    """
    damaged = f"{path} is damaged. The command of its run makes it again."
    try:
        data = path.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        heads = [json.loads(content) for name, content in members.items() if name.endswith(".json") and name != INDEX]
        samples = [Sample(**head, pictures=_pictures(f"{head['id']:06d}", members)) for head in heads]
        whole = bool(samples) and _tar(samples) == data
    except (tarfile.TarError, OSError, LookupError, ValueError, TypeError, AttributeError, EOFError) as error:
        raise UserError(damaged) from error
    require(whole, damaged)
    return samples


def shards_of(folder: Path) -> dict[tuple[int, int], Path]:
    """The run's shards by their first and last id, in order; without those whose ids another holds too.

    A shorter shard stays behind where a run was stopped between writing a longer one and deleting it.
    """
    found = {}
    for path in sorted((folder / SHARDS).glob("*-*.tar")):
        first, _, last = path.stem.partition("-")
        if first.isdecimal() and last.isdecimal():
            found[int(first), int(last)] = path
    held, end = {}, -1
    for span in sorted(found, key=lambda span: (span[0], -span[1])):
        if span[1] > end:
            held[span], end = found[span], span[1]
    return held


def count_images(folder: Path) -> int:
    """How many images the run's shards hold."""
    return sum(last - first + 1 for first, last in shards_of(folder))


def iter_samples(folder: Path, num_samples: int | None = None) -> Iterator[Sample]:
    """A run's samples in order of their ids, one shard in memory at a time; the first `num_samples`, or all.

    Raises:
        UserError: a shard is damaged.
    """
    left = num_samples
    for path in shards_of(folder).values():
        if left is not None and left <= 0:
            return
        samples = read_shard(path)[:left]
        left = None if left is None else left - len(samples)
        yield from samples


def shared_ids(folders: Sequence[Path], count: int) -> list[int]:
    """The first `count` ids that all of these runs hold; fewer where they share fewer."""
    spans = list(shards_of(folders[0]))
    for folder in folders[1:]:
        others = list(shards_of(folder))
        both = [(max(a, c), min(b, d)) for a, b in spans for c, d in others]
        spans = [(first, last) for first, last in both if first <= last]
    return list(islice(chain.from_iterable(range(first, last + 1) for first, last in sorted(spans)), count))


def get_samples(folder: Path, ids: Sequence[int]) -> list[Sample]:
    """A run's samples of these ids, in their order; only the shards that hold them are read.

    Raises:
        UserError: a shard is damaged, or the run holds no such id.
    """
    found: dict[int, Sample] = {}
    for (first, last), path in shards_of(folder).items():
        if any(first <= i <= last for i in ids):
            found |= {sample.id: sample for sample in read_shard(path)}
    missing = [i for i in ids if i not in found]
    require(not missing, f"`run` must hold image {missing and missing[0]}, and {folder} does not.")
    return [found[i] for i in ids]


def _tar(samples: Sequence[Sample]) -> bytes:
    """The samples, then the index of what came before it. Owner, mode and time are tarfile's own: root, 0644, 1970."""
    members = [member for sample in samples for member in _members(sample)]
    index = {name: {"length": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in members}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (*members, (INDEX, _json(index))):
            head = tarfile.TarInfo(name)
            head.size = len(data)
            tar.addfile(head, io.BytesIO(data))
    return file.getvalue()


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    key = f"{sample.id:06d}"
    for row, picture in sample.pictures.items():
        yield (f"{key}.png" if row == SAMPLES else f"{key}.{row}.png"), picture
    yield f"{key}.json", _json({"id": sample.id, "label": sample.label, "seed": sample.seed})


def _pictures(key: str, members: Mapping[str, bytes]) -> dict[str, bytes]:
    rows = {
        name.removeprefix(f"{key}.").removesuffix("png").rstrip("."): data
        for name, data in members.items()
        if name.startswith(f"{key}.") and name.endswith(".png")
    }
    return {row or SAMPLES: data for row, data in rows.items()}


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


# ------------------------------------------------------------------------------------------------------- record


def is_run(folder: Path) -> bool:
    """Whether there is a run.json to be seen."""
    try:
        return (folder / RECORD).is_file()
    except OSError:
        return False


def read_run_json(folder: Path, argument: str = "output") -> dict[str, Any]:
    """run.json; empty where there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
        require(isinstance(record, dict) and isinstance(record.get("settings"), dict), "no settings")
    except ValueError as error:
        raise UserError(
            f"`{argument}` must hold a whole {RECORD}, and {path} is damaged. Delete it to start again."
        ) from error
    return dict(record)


def write_run_json(folder: Path, record: Mapping[str, Any]) -> None:
    """run.json, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with atomic_file(folder / RECORD) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")


def check_same_run(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The folder's record, if the folder is new or holds a run of these settings.

    Args:
        folder: may be missing.
        settings: all that decides an image, nested as it may be; the number of images is none of it.

    Raises:
        UserError: it holds a run of other settings (names the first that differs), or other files.
    """
    record = read_run_json(folder)
    if not record:
        others = (
            [p.name for p in sorted(folder.iterdir()) if p.name != LOCK and not p.name.endswith(PARTIAL)]
            if folder.is_dir()
            else []
        )
        require(
            not others,
            f"`output` must be a new folder or a run of sagl sample, and {folder} holds {others and others[0]}. "
            "Choose another folder.",
        )
        return {}
    found, asked = flat(record["settings"]), flat(json.loads(json.dumps(settings)))
    for name in dict.fromkeys((*asked, *found)):
        require(
            found.get(name) == asked.get(name),
            f"`output` {folder} holds a run with {name} {found.get(name)!r}, got {asked.get(name)!r}. "
            "Choose another folder, or delete this one.",
        )
    return record


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by full names, in their order: {"sag": {"scale": 1}} -> {"sag.scale": 1}."""
    names: dict[str, Any] = {}
    for name, value in settings.items():
        names |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return names


def missing_batches(folder: Path, batches: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Those of the micro-batches that no whole shard of the folder holds.

    Args:
        folder: the run.
        batches: ids wanted of each micro-batch, consecutive.
    """
    there = shards_of(folder)
    return [ids for ids in batches if not any(_holds(span, path, ids) for span, path in there.items())]


def remove_superseded(folder: Path) -> None:
    """Delete shards of a shorter run, whose ids a longer shard holds too."""
    kept = set(shards_of(folder).values())
    for path in (folder / SHARDS).glob("*-*.tar"):
        if path not in kept:
            path.unlink()


def remove_damaged(folder: Path, missing: Sequence[Sequence[int]]) -> None:
    """Delete damaged shards that hold ids of the missing micro-batches, before these are made again."""
    for (first, last), path in shards_of(folder).items():
        overlaps = any(ids[0] <= last and first <= ids[-1] for ids in missing)
        if overlaps and not _holds((first, last), path, (first, last)):
            path.unlink()


def remove_partial(folder: Path) -> None:
    """Delete files that a process had not finished when it was killed; no other may be at work in the folder."""
    for place in (folder, folder / SHARDS):
        for path in place.glob(f"*{PARTIAL}"):
            path.unlink()


def _holds(span: tuple[int, int], path: Path, ids: Sequence[int]) -> bool:
    if not (span[0] <= ids[0] and ids[-1] <= span[1]):
        return False
    try:
        return [sample.id for sample in read_shard(path)] == list(range(span[0], span[1] + 1))
    except UserError:
        return False
