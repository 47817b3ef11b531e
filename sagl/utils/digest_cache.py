"""SHA-256 of large files, computed once and stored beside them."""

import json
from contextlib import suppress
from pathlib import Path

from sagl.errors import UserError, require
from sagl.utils.files import cache_file, cache_folder, sha256


def weights_sha256(path: Path) -> str:
    """Return the hex digest of a weight file; that of a file in the cache folder is computed once.

    Raises:
        UserError: As `cached_sha256`, for a file in the cache folder.
    """
    return cached_sha256(path) if path.is_relative_to(cache_folder()) else sha256(path)


def cached_sha256(path: Path) -> str:
    """Return the hex digest of a file; compute it at the first call and store it in `<name>.sha256`.

    Later calls return the stored digest if length and modification time are unchanged. Nothing is stored if the folder
    cannot be written.

    Raises:
        UserError: The file does not exist, or its content has changed since the first call.
    """
    require(path.is_file(), f"`path` must be a file, but {path} does not exist. Download it again.")
    record_path = _record_path(path)
    stat, record = path.stat(), _read_record(record_path)
    if record and (record["length"], record["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
        return str(record["sha256"])
    digest = sha256(path)
    require(
        not record or record["sha256"] == digest,
        f"`path` must be unchanged since its first use, but {path} has sha256 {digest} instead of "
        f"{record.get('sha256')}. Delete {record_path.name} to accept the new file, or both to download it again.",
    )
    record = {"sha256": digest, "length": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    with suppress(UserError), cache_file(record_path, "path") as partial:
        partial.write_text(json.dumps(record) + "\n")
    return digest


def forget_sha256(path: Path) -> None:
    """Delete the stored digest of a file that was replaced on purpose."""
    _record_path(path).unlink(missing_ok=True)


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _read_record(path: Path) -> dict[str, object]:
    """Return sha256, length and mtime_ns; empty if the file is missing or damaged."""
    try:
        record = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
    return record if {"sha256", "length", "mtime_ns"} <= record.keys() else {}
