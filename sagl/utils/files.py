"""Files and folders of the user: cache, packaged configs, checksums, atomic writes, checks of output paths."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from sagl.errors import UserError, require

PARTIAL = ".partial"
"""Suffix of a file that is being written."""


def cache_folder() -> Path:
    """Return the folder of downloads and unpacked data: $SAGL_CACHE, else $XDG_CACHE_HOME/sagl, else ~/.cache/sagl."""
    if folder := os.environ.get("SAGL_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sagl"


def packaged_configs() -> Path:
    """Return the folder of the packaged configs: inside the package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_file(path: Path, argument: str = "output") -> Iterator[Path]:
    """Write a file completely or not at all, replacing an existing one.

    Yields:
        A temporary path to write to. It is synced to disk and renamed to `path` if the block succeeds.

    Raises:
        UserError: The disk is full or read-only, or a folder has this name; names `argument`.
    """
    require(bool(path.name) and not path.is_dir(), f"`{argument}` must be a file, but {path} is a folder.")
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with _write_errors(path, argument):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _sync(partial)
            os.replace(partial, path)
    finally:
        with suppress(OSError):  # its folder may not exist
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, argument: str = "output") -> Iterator[Path]:
    """Write a folder of files completely or not at all.

    Yields:
        A temporary folder to write to. Its files are synced to disk and it is renamed to `folder` if the block
        succeeds.

    Raises:
        UserError: The folder is not empty, or the disk is full or read-only; names `argument`.
    """
    require_unused(folder, argument)
    with _write_errors(folder, argument):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}{PARTIAL}-") as temporary:
            partial = Path(temporary) / "folder"  # has the permissions of a new folder; TemporaryDirectory is private
            partial.mkdir()
            yield partial
            for file in partial.iterdir():
                _sync(file)
            os.replace(partial, folder)


def require_unused(folder: Path, argument: str = "output") -> None:
    """Refuse a file, or a folder that is not empty.

    Raises:
        UserError: Names `argument`.
    """
    in_use = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    require(not in_use, f"`{argument}` must be a new or an empty folder, but {folder} is in use. Choose another one.")


def require_new(path: Path, *, overwrite: bool) -> None:
    """Refuse an output file that exists or cannot be written, before the work for it.

    Raises:
        UserError: Names `output`.
    """
    require(not path.is_dir(), f"`output` must be a file, but {path} is a folder.")
    require(overwrite or not path.exists(), f"`output` {path} exists. Choose another name, or set `overwrite`.")
    require_writable(path.parent)


def require_writable(folder: Path, argument: str = "output", hint: str = "") -> None:
    """Refuse a folder that cannot be created or written to.

    Args:
        folder: Existing or new folder.
        argument: Name of the parameter in messages.
        hint: Last sentence of the message; by default, to choose another folder.

    Raises:
        UserError: Names `argument` and the part of the path that prevents writing.
    """
    hint = hint or f"Choose another folder for `{argument}`."
    try:
        existing = nearest_existing(folder)
    except OSError as error:
        raise UserError(f"`{argument}` must be a folder that can be created: {error.strerror}. {hint}") from error
    require(existing.is_dir(), f"`{argument}` must be a folder, but {existing} is a file. {hint}")
    writable = os.access(existing, os.W_OK | os.X_OK)
    require(writable, f"`{argument}` must be a writable folder, but {existing} is not. {hint}")


def nearest_existing(path: Path) -> Path:
    """Return the path itself, or its nearest parent that exists and can be accessed."""
    for part in (path, *path.absolute().parents):
        with suppress(PermissionError):
            if part.exists() or part.is_symlink():
                return part
    return Path(path.anchor or ".")


def _sync(path: Path) -> None:
    """Give a file the default permissions and wait until its bytes are on disk."""
    with path.open("rb+") as file:
        os.fchmod(file.fileno(), 0o666 & ~_umask())  # some writers create files that only their owner can read
        os.fsync(file.fileno())


def _umask() -> int:
    """Return the umask, which can only be read by setting it."""
    os.umask(umask := os.umask(0o077))
    return umask


@contextmanager
def _write_errors(path: Path, argument: str) -> Iterator[None]:
    """Convert an error of the file system to a UserError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "Free some space and repeat the command" if full else "Choose another place"
        raise UserError(f"`{argument}` {path} cannot be written: {error.strerror or error}. {hint}.") from error
