"""A run folder belongs to one command at a time, and to all processes of that command."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sagl.errors import UserError, require
from sagl.utils.files import require_writable

LOCK = ".lock"
"""The file in the run folder that is locked; it is there while a command runs, and after one that was killed."""
PATIENCE_SECONDS = 10.0
"""For processes of a command that was killed to notice that they are to end."""
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


class RunLock:
    """The hold of one process on a run folder."""

    def __init__(self, folder: Path, kind: int) -> None:
        """Wait a little for the folder, and hold it alone or beside others.

        Raises:
            UserError: it remains in use.
        """
        self.folder = folder
        self.file = (folder / LOCK).open("a")
        try:
            self._take(kind)
            while os.fstat(self.file.fileno()).st_nlink == 0:  # who held it took the file away
                self.file.close()
                self.file = (folder / LOCK).open("a")
                self._take(kind)
        except UserError:
            self.file.close()
            raise

    def share(self) -> None:
        """Let the command's other processes in, and no other command.

        Raises:
            UserError: another command came between.
        """
        self._take(fcntl.LOCK_SH)

    def _take(self, kind: int) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not self._tried(kind):
            require(
                time.monotonic() < until,
                f"`output` must be a folder that no other command writes to, and {self.folder} is in use. Wait for it, "
                "stop it, or choose another folder.",
            )
            time.sleep(0.1)

    def _tried(self, kind: int) -> bool:
        try:
            fcntl.flock(self.file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            print(f"{self.folder}: this file system has no locks. See that one command at a time writes to it.")
        return True


@contextmanager
def locked(folder: Path) -> Iterator[RunLock]:
    """Hold a run folder alone. It is made where it is missing, and goes again if it is left empty.

    Raises:
        UserError: another command, or a process that one left behind, holds it; it cannot be written.
    """
    require_writable(folder)
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder, fcntl.LOCK_EX)
    try:
        yield lock
    finally:
        if lock._tried(fcntl.LOCK_EX):  # no process of this command is left
            (folder / LOCK).unlink(missing_ok=True)
        lock.file.close()
        with suppress(OSError):  # it is not empty
            for empty in made:
                empty.rmdir()


@contextmanager
def sharing(folder: Path) -> Iterator[None]:
    """Hold a run folder beside the first process of the same command, which has called `share`.

    Raises:
        UserError: the folder belongs to another command by now.
    """
    with RunLock(folder, fcntl.LOCK_SH).file:
        yield
