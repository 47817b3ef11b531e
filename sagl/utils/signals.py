"""Signals that ask a command to end: SIGINT (Ctrl-C), SIGTERM and SIGHUP."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTACT = "all files are intact, and the same command continues from them"


class Interrupted(BaseException):
    """A command ends because of a signal. Unlike KeyboardInterrupt, no library catches it.

    Args:
        number: number of the signal.
        consequence: what is on the disk, for the user.
        is_lost: whether the work of the command is lost.
    """

    def __init__(self, number: int, consequence: str = INTACT, *, is_lost: bool = False) -> None:
        super().__init__(f"{signal.Signals(number).name}: {consequence}.")
        self.number, self.is_lost = number, is_lost


def raise_interrupted(number: int) -> None:
    """Handle a stop signal by ending the command.

    Raises:
        Interrupted: always.
    """
    raise Interrupted(number)


@contextmanager
def on_stop_signal(handler: Callable[[int], None], repeat_seconds: float = 0) -> Iterator[None]:
    """Call `handler` with the number of the first stop signal; a second one ends the process at once.

    A signal that the process was started to ignore, such as SIGHUP by nohup, stays ignored.

    Args:
        handler: function that is called with the number of the signal.
        repeat_seconds: time in which further signals are taken for the first one, and ignored. torchrun passes on a
            signal that the scheduler has already sent to all processes.
    """

    def handle(number: int, _: Any) -> None:  # noqa: ANN401 (a frame)
        handled = [other for other in STOP_SIGNALS if signal.getsignal(other) == handle]
        if repeat_seconds:
            for other in handled:
                signal.signal(other, signal.SIG_IGN)
            time.sleep(repeat_seconds)
        for other in handled:
            signal.signal(other, signal.SIG_DFL)
        handler(number)

    with _stop_signals_handled_by(handle):
        yield


@contextmanager
def end_at_stop_signals() -> Iterator[None]:
    """Let a stop signal end the process at once.

    Python calls handlers between two instructions, and so never while a library waits for another process.
    """
    with _stop_signals_handled_by(signal.SIG_DFL):
        yield


@contextmanager
def _stop_signals_handled_by(action: Any) -> Iterator[None]:  # noqa: ANN401 (as of signal.signal)
    """Set the action of the stop signals that are not ignored, in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handled = [number for number in STOP_SIGNALS if previous[number] not in (signal.SIG_IGN, None)]
    try:
        for number in handled:
            signal.signal(number, action)
        yield
    finally:
        for number in handled:
            signal.signal(number, previous[number])


@contextmanager
def block_stop_signals() -> Iterator[None]:
    """Block the stop signals. Processes that are started in the body inherit this, and so ignore them.

    A terminal, `timeout` and cluster schedulers signal all processes of a command, and the main process needs its
    workers until it has saved its work. A worker calls `obey_stop_signals_of_parent`.
    """
    resource_tracker.ensure_running()  # its start, by some ways of starting processes, would unblock the signals
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def obey_stop_signals_of_parent(_: int = 0) -> None:
    """Ignore the stop signals in this worker process, except those of its parent, and end with its parent.

    A worker of a fork server has the server as its parent in the operating system, so that the way in which PyTorch's
    workers notice the death of the main process misses it. Blocks the signals, because a worker of a fork server that
    is older than `block_stop_signals` has not inherited the block; such a server itself still ends at SIGTERM and
    SIGHUP. Takes the number of the worker, which is not used.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):
        return
    pid = parent.pid
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def watch() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != pid:
            pass
        os._exit(0)

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    for target in (watch, end_with_parent):
        threading.Thread(target=target, daemon=True).start()
