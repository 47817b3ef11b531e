"""Files and folders of the user: cache, packaged configs, checksums, atomic writes, checks of output paths."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sagl.errors import UserError, require

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk or quota."""
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)
"""A variable of the environment in a path: $NAME or ${NAME}."""


def expand_path(text: str, argument: str) -> str:
    """Return a path with ~, ~USER and variables of the environment replaced, as shells do.

    Raises:
        UserError: A variable is not set, or a user has no home folder; names `argument`.
    """
    for names in VARIABLE.findall(text):
        name = "".join(names)
        require(name in os.environ, f"`{argument}` {text} contains ${name}, which is not set. Set it, or write it out.")
    text = VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], text)
    expanded = os.path.expanduser(text)
    require(
        not expanded.startswith("~") and (not text.startswith("~") or os.environ.get("HOME") != ""),
        f"`{argument}` {text} needs a home folder, and there is none. Set HOME, or `{argument}` to another path.",
    )
    return expanded


def expand_paths(value: Any, argument: str = "") -> Any:  # noqa: ANN401 (nested settings of any kind)
    """Return nested settings with `expand_path` applied to every text, under its full name."""
    if isinstance(value, str):
        return expand_path(value, argument)
    if isinstance(value, dict):
        prefix = f"{argument}." if argument else ""
        return {name: expand_paths(item, f"{prefix}{name}") for name, item in value.items()}
    return [expand_paths(item, argument) for item in value] if isinstance(value, list) else value


def cache_folder() -> Path:
    """Return the folder of downloads and unpacked data: $SAGL_CACHE, else $XDG_CACHE_HOME/sagl, else ~/.cache/sagl.

    Raises:
        UserError: There is no home folder.
    """
    if folder := os.environ.get("SAGL_CACHE"):
        return Path(expand_path(folder, "SAGL_CACHE"))
    return Path(expand_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "SAGL_CACHE")) / "sagl"


def packaged_configs() -> Path:
    """Return the folder of the packaged configs: inside the package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def is_utf8(path: Path) -> bool:
    """Return whether a path is UTF-8, as safetensors requires of the paths that it opens."""
    return str(path) == str(path).encode(errors="replace").decode()


def json_sha256(content: Any) -> str:  # noqa: ANN401 (any JSON value)
    """Return the hex digest of a JSON value, to be stored in its file, so that damage is noticed."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_version(path: Path) -> bytes:
    """Return path, size, times and inode of a file, which differ after any change of its content.

    The modification time alone can be set back by the program that changes the file; the change time cannot.
    """
    stat = path.stat()
    return os.fsencode(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}")


# ---------------------------------------------------------------------------------------------- atomic writes


@contextmanager
def atomic_file(path: Path, argument: str = "output") -> Iterator[Path]:
    """Write a file completely or not at all, replacing an existing one.

    Yields:
        A temporary path to write to, NAME.PID.partial. It is synced to disk and renamed to `path` if the block
        succeeds, and removed otherwise.

    Raises:
        UserError: The disk is full or read-only, or a folder has this name; names `argument`.
    """
    require(bool(path.name) and not path.is_dir(), f"`{argument}` must be a file, but {path} is a folder.")
    with file_errors(path, argument), _locked_partial(path, is_folder=False) as partial:
        yield partial
        _sync(partial)
        os.replace(partial, path)


def write_text(path: Path, text: str, argument: str = "output") -> None:
    """Write a text file in UTF-8 as `atomic_file` does; names that are not UTF-8 are written with escapes.

    Raises:
        UserError: As `atomic_file`.
    """
    with atomic_file(path, argument) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def atomic_folder(folder: Path, argument: str = "output") -> Iterator[Path]:
    """Write a folder of files completely or not at all.

    Yields:
        A temporary folder to write to, NAME.PID.partial. Its files are synced to disk and it is renamed to `folder` if
        the block succeeds, and it is removed otherwise.

    Raises:
        UserError: The folder is not empty, or the disk is full or read-only; names `argument`.
    """
    require_unused(folder, argument)
    with file_errors(folder, argument), _locked_partial(folder, is_folder=True) as partial:
        yield partial
        for file in partial.iterdir():
            _sync(file)
        os.replace(partial, folder)


@contextmanager
def cache_file(path: Path, argument: str = "SAGL_CACHE") -> Iterator[Path]:
    """Write a file of the cache as `atomic_file` does; remove what killed processes left of it before.

    Raises:
        UserError: The file cannot be written; names `argument`.
    """
    remove_partial(path.parent, partial_pattern(path))
    with atomic_file(path, argument) as partial:
        yield partial


def partial_pattern(path: Path) -> str:
    """Return the pattern for `remove_partial` of the incomplete files of a path."""
    return f"{glob.escape(path.name)}.*"


def is_partial(path: Path) -> bool:
    """Return whether this is the name of an incomplete file or folder of ours: NAME.PID.partial."""
    return re.search(r".\.\d+\.partial$", path.name) is not None


def remove_partial(folder: Path, *patterns: str) -> None:
    """Delete incomplete files and folders of processes that were killed.

    The writer of such a file holds a lock on it for as long as it lives. One that is locked, or that the file system
    cannot lock, is kept.

    Args:
        folder: Folder to search; may be missing.
        patterns: Glob patterns relative to the folder, such as "*" or "shards/*".
    """
    for pattern in patterns:
        for path in filter(is_partial, folder.glob(f"{pattern}.partial")):
            with suppress(OSError):
                descriptor = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if path.is_dir() else os.O_RDWR))
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                finally:
                    os.close(descriptor)


@contextmanager
def _locked_partial(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """Create the incomplete file or folder of a path, hold a lock on it, and remove it unless it was renamed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _create_locked(partial, is_folder=is_folder)
    try:
        yield partial
    finally:
        with suppress(OSError):
            shutil.rmtree(partial) if is_folder else partial.unlink(missing_ok=True)
        os.close(descriptor)


def _create_locked(partial: Path, *, is_folder: bool) -> int:
    """Create and lock an incomplete file or folder; return the descriptor that holds the lock."""
    while True:
        if is_folder:
            partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # another process removed or renamed it before it was locked
            if os.path.samestat(os.stat(descriptor), partial.stat()):
                return descriptor
        os.close(descriptor)


# ------------------------------------------------------------------------------------------- checks of outputs


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


@contextmanager
def file_errors(path: Path, argument: str = "output", numbers: tuple[int, ...] | None = None) -> Iterator[None]:
    """Convert an error of the file system, or only those with certain numbers, to a UserError.

    Raises:
        UserError: Names `argument`, the path and the reason.
    """
    try:
        yield
    except OSError as error:
        if numbers is not None and error.errno not in numbers:
            raise
        hint = "Free some space and repeat the command" if error.errno in NO_SPACE else "Choose another place"
        raise UserError(f"`{argument}` {path} cannot be written: {error.strerror or error}. {hint}.") from error


def _sync(path: Path) -> None:
    """Give a file the default permissions and wait until its bytes are on disk."""
    with path.open("rb+") as file:
        os.fchmod(file.fileno(), 0o666 & ~_umask())  # some writers create files that only their owner can read
        os.fsync(file.fileno())


def _umask() -> int:
    """Return the umask, which can only be read by setting it."""
    os.umask(umask := os.umask(0o077))
    return umask
