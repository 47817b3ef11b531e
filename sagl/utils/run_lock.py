"""Locks of outputs, so that one command at a time writes to a folder or a file."""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sagl.errors import UserError, require
from sagl.settings.sampling import DeviceSettings
from sagl.utils.distributed import global_rank, refuse_on_all_ranks
from sagl.utils.files import partial_pattern, remove_partial, require_new, require_writable

LOCK_NAME = ".lock"
"""Lock file in a folder. A command that was killed leaves it behind, unlocked."""
LOCK_TIMEOUT_SECONDS = 10.0
"""Time for the processes of a command that was killed to end."""


@contextmanager
def lock_folder(folder: Path, argument: str = "output") -> Iterator[None]:
    """Hold a folder for this command; create it if it is missing, and remove it if it is empty at the end.

    Rank 0 of a command holds the lock for all ranks. What a command decides from the content of the folder, it reads
    under the lock.

    Raises:
        UserError: another command holds the folder, or it cannot be written; names `argument`.
    """
    require_writable(folder, argument)
    with _lock(folder / LOCK_NAME, folder, argument):
        yield


@contextmanager
def lock_file(path: Path, argument: str = "output") -> Iterator[None]:
    """Hold a file, or a folder that is written as a whole, and remove what killed commands left of it.

    The lock is .NAME.lock beside the file. Rank 0 of a command holds it for all ranks.

    Raises:
        UserError: another command holds the file, or it cannot be written; names `argument`.
    """
    require(bool(path.name), f"`{argument}` must be the name of a file or a new folder, got {path}.")
    require_writable(path.absolute().parent, argument, f"Choose another place than {path}.")
    with _lock(path.with_name(f".{path.name}{LOCK_NAME}"), path, argument):
        remove_partial(path.parent, partial_pattern(path))
        yield


@contextmanager
def lock_new_file(path: Path, devices: DeviceSettings, *, overwrite: bool) -> Iterator[None]:
    """Hold a file as `lock_file` does, on rank 0 of a command of several processes; it must be new unless `overwrite`.

    Raises:
        UserError: on all ranks, if rank 0 is refused.
    """
    with ExitStack() as stack:
        with refuse_on_all_ranks(devices):
            if global_rank() == 0:
                stack.enter_context(lock_file(path))
                require_new(path, overwrite=overwrite)
        yield


@contextmanager
def _lock(lock_path: Path, target: Path, argument: str) -> Iterator[None]:
    """Hold a lock file; create its folder if it is missing, and remove it if it is empty at the end."""
    created = [path for path in lock_path.absolute().parents if not path.exists()]
    lock = FileLock(lock_path, timeout=LOCK_TIMEOUT_SECONDS)
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"`{argument}` must not be in use by another command, and {target} is in use. Wait for the other command, "
            "stop it, or choose another place."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise UserError(f"`{argument}` {target} cannot be locked: {error.strerror or error}.") from error
        print(f"{target}: this file system has no locks. Make sure that one command at a time writes to it.")
    try:
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # not empty
            for path in created:
                path.rmdir()
