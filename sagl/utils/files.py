"""Files and folders that belong to the user: where they are, and how they are written."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from sagl.errors import UserError, require

PARTIAL = ".partial"
"""How the name of a file ends while it is being written."""


def cache_folder() -> Path:
    """Where downloads and unpacked data are kept: $SAGL_CACHE, else $XDG_CACHE_HOME/sagl, else ~/.cache/sagl."""
    if chosen := os.environ.get("SAGL_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sagl"


def packaged_configs() -> Path:
    """The folder of the configs that come with the package: inside it, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_file(path: Path, argument: str = "output") -> Iterator[Path]:
    """A file that appears under its name when it is whole, or not at all.

    Yields:
        The name to write under. When the block ends well the bytes are on the disk and have their own name.

    Raises:
        UserError: no room, no right to write; names `argument`.
    """
    require(bool(path.name) and not path.is_dir(), f"`{argument}` must be a file, and {path} is a folder.")
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _settle(partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"`{argument}` {path} cannot be written: {_reason(error)}.") from error
    finally:
        with suppress(OSError):  # where its folder could not be made
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, argument: str = "output") -> Iterator[Path]:
    """A folder that appears under its name when all its files are whole, or not at all.

    Yields:
        The folder to write in. When the block ends well the bytes are on the disk and the folder has its own name.

    Raises:
        UserError: the folder is in use; no room, no right to write; names `argument`.
    """
    require_unused(folder, argument)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}{PARTIAL}-") as around:
            partial = Path(around) / "folder"  # with the permissions of any new folder, unlike the one around it
            partial.mkdir()
            yield partial
            for file in partial.iterdir():
                _settle(file)
            os.replace(partial, folder)
    except OSError as error:
        raise UserError(f"`{argument}` {folder} cannot be written: {_reason(error)}.") from error


def require_unused(folder: Path, argument: str = "output") -> None:
    """Refuse a folder that holds something, or a file of its name.

    Raises:
        UserError: names `argument`.
    """
    in_use = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    require(not in_use, f"`{argument}` must be a new or an empty folder, and {folder} is in use. Choose another one.")


def require_new(path: Path, *, overwrite: bool) -> None:
    """Refuse an `--output` file before the work for it: one that is there, or a name that cannot be written.

    Raises:
        UserError: says the way out.
    """
    require(not path.is_dir(), f"`output` must be a file, and {path} is a folder.")
    require(overwrite or not path.exists(), f"`output` {path} is there. Choose another name, or --overwrite.")
    require_writable(path.parent)


def require_writable(folder: Path, argument: str = "output", way_out: str = "") -> None:
    """Refuse a folder that is not there and could not be made, or could not be written to.

    Args:
        folder: there, or not yet.
        argument: what is called wrong.
        way_out: where it is no flag.

    Raises:
        UserError: says which part of the path stands in the way.
    """
    try:
        there = nearest_existing(folder)
    except OSError as error:
        raise UserError(
            f"`{argument}` must be a folder that can be made: {error.strerror}. Choose another name."
        ) from error
    require(there.is_dir(), f"`{argument}` must be a folder, and {there} is a file. Choose another name.")
    require(
        os.access(there, os.W_OK | os.X_OK),
        f"`{argument}` must be a folder that can be written, and {there} cannot. "
        + (way_out or f"Choose another with --{argument}."),
    )


def _settle(path: Path) -> None:
    """Give a file the user's rights, and wait until its bytes are on the disk."""
    with path.open("rb+") as file:
        os.fchmod(file.fileno(), 0o666 & ~_umask())  # some writers make files that their owner alone can read
        os.fsync(file.fileno())


def _umask() -> int:
    """The rights that the user withholds from new files; it can only be read by setting it."""
    os.umask(umask := os.umask(0o077))
    return umask


def nearest_existing(path: Path) -> Path:
    """The path itself, or the first folder above it that is there and can be looked into."""
    for part in (path, *path.absolute().parents):
        with suppress(PermissionError):
            if part.exists() or part.is_symlink():
                return part
    return Path(path.anchor or ".")


def _reason(error: OSError) -> str:
    """What went wrong, and the way out."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.strerror}. Make room, then give the same command again: it goes on where it stopped"
    return f"{error.strerror or error}. Choose another place"
