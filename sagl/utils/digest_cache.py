"""The sha256 of large files, computed once and remembered beside them."""

import json
from contextlib import suppress
from pathlib import Path

from sagl.errors import UserError, require
from sagl.utils.files import atomic_file, sha256


def cached_sha256(path: Path) -> str:
    """Hex digest of a file, computed at first use and kept beside it in `<name>.sha256`.

    Later calls return the record while length and time of the last change are the same. Where the folder cannot
    be written, nothing is kept.

    Raises:
        UserError: there is no such file, or it has other bytes than at first use.
    """
    require(path.is_file(), f"`path` must be a file, and there is none at {path}. Fetch it again.")
    record = path.with_name(path.name + ".sha256")
    stat, known = path.stat(), _read_record(record)
    if known and (known["length"], known["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
        return str(known["sha256"])
    digest = sha256(path)
    require(
        not known or known["sha256"] == digest,
        f"`path` must be the file of its first use, and {path} has changed since: sha256 {digest}, "
        f"recorded {known.get('sha256')}. Delete both it and {record.name} to fetch it again, "
        f"or {record.name} alone to keep the new one.",
    )
    seen = {"sha256": digest, "length": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    with suppress(UserError), atomic_file(record, "path") as partial:
        partial.write_text(json.dumps(seen) + "\n")
    return digest


def _read_record(path: Path) -> dict[str, object]:
    """sha256, length, mtime_ns; empty where there is no whole record."""
    try:
        found = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
    return found if {"sha256", "length", "mtime_ns"} <= found.keys() else {}
