"""Lock of a run folder, so that one command at a time writes to it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sagl.errors import UserError
from sagl.utils.files import require_writable

LOCK_NAME = ".lock"
"""Lock file in the run folder. A command that was killed leaves it behind, unlocked."""
LOCK_TIMEOUT_SECONDS = 10.0
"""Time for the processes of a command that was killed to end."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a run folder for this command; create it if it is missing, and remove it if it is empty at the end.

    Rank 0 of a command holds the lock for all ranks.

    Raises:
        UserError: another command holds the folder, or it cannot be written.
    """
    require_writable(folder)
    created = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME, timeout=LOCK_TIMEOUT_SECONDS)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"`output` must be a folder that no other command writes to, and {folder} is in use. Wait for the other "
            "command, stop it, or choose another folder."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"{folder}: this file system has no locks. Make sure that one command at a time writes to it.")
    try:
        yield
    finally:
        (folder / LOCK_NAME).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # not empty
            for path in created:
                path.rmdir()
