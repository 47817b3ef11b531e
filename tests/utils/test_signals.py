import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest

from sagl.utils.signals import (
    STOP_SIGNALS,
    Interrupted,
    block_stop_signals,
    end_at_stop_signals,
    obey_stop_signals_of_parent,
    on_stop_signal,
    raise_interrupted,
)
from tests.helpers.processes import is_alive


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of this process, which a test must leave as they were."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_calls_the_handler_and_a_second_one_would_end_the_process(number):
    numbers = []
    with on_stop_signal(numbers.append):
        signal.raise_signal(number)
        assert numbers == [number]
        assert {signal.getsignal(other) for other in STOP_SIGNALS} == {signal.SIG_DFL}


def test_a_repeated_signal_is_taken_for_the_first_one():
    """A scheduler signals all processes, and torchrun passes its own signal on to them."""
    numbers = []

    def repeat(number, stop):
        while not stop.wait(0.01):
            os.kill(os.getpid(), number)

    stop = threading.Event()
    repeater = threading.Thread(target=repeat, args=(signal.SIGTERM, stop))
    with on_stop_signal(numbers.append, repeat_seconds=0.3):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        repeater.start()  # it inherits the block, so that this thread receives the signals
        threading.Timer(0.2, stop.set).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        repeater.join()
        assert numbers == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_is_ignored_from_the_start_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_stop_signal(raise_interrupted):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_handled_as_soon_as_it_has_its_handler(number, monkeypatch):
    install, sent = signal.signal, []

    def install_and_send(other, action):
        previous = install(other, action)
        if other == number and not sent:
            sent.append(number)
            signal.raise_signal(number)
        return previous

    monkeypatch.setattr(signal, "signal", install_and_send)
    with pytest.raises(Interrupted), on_stop_signal(raise_interrupted):
        pytest.fail("The body began.")


def test_while_processes_connect_a_stop_signal_has_no_handler_of_python():
    with on_stop_signal(raise_interrupted):
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        with end_at_stop_signals():
            assert {signal.getsignal(number) for number in STOP_SIGNALS} == {signal.SIG_DFL}
        assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def test_no_library_catches_the_end_of_a_command():
    with pytest.raises(Interrupted) as end, on_stop_signal(raise_interrupted):
        signal.raise_signal(signal.SIGTERM)
    assert end.value.number == signal.SIGTERM
    assert not isinstance(end.value, Exception | KeyboardInterrupt)


def test_processes_that_are_started_while_stop_signals_are_blocked_ignore_them():
    with block_stop_signals():
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    for number in STOP_SIGNALS:
        os.kill(child.pid, number)
    child.communicate(b"\n")
    assert child.returncode == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS) == set()


def wait(ready):
    obey_stop_signals_of_parent()
    ready.set()
    signal.pause()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_ignores_the_stop_signals_of_others_and_obeys_its_parent(method):
    check_worker(method, block_stop_signals())


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_forked_worker_need_not_inherit_the_block(method):
    """The fork server of a process may be older than the block. A spawned worker inherits it in all its threads."""
    check_worker(method, nullcontext())


def start_worker_and_die(method, connection):
    context = multiprocessing.get_context(method)
    ready = context.Event()
    worker = context.Process(target=wait, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(60)
    connection.send(worker.pid)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_ends_when_its_parent_is_killed(method):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    parent = multiprocessing.get_context("spawn").Process(target=start_worker_and_die, args=(method, sender))
    parent.start()
    assert receiver.poll(60)
    pid = receiver.recv()
    parent.join(60)
    assert parent.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(pid)


def check_worker(method, start_context):
    context = multiprocessing.get_context(method)
    ready = context.Event()
    worker = context.Process(target=wait, args=(ready,), daemon=True)
    with start_context:
        worker.start()
    assert ready.wait(60)
    kill = "for number in 1 2 15; do kill -$number $0; done"  # by another process than its parent
    subprocess.run(["sh", "-c", kill, str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0
