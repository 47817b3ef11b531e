"""Processes of modules that are programs, forked from a server that has imported the libraries, but nothing of sagl.

They save the seconds in which a new interpreter imports PyTorch and Lightning.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

import torch

LIBRARIES = ["lightning.pytorch", "lightning.pytorch.cli", "torchvision", "torch._dynamo", "torch.utils.tensorboard"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(LIBRARIES)


class Process:
    """`python -m MODULE ARGUMENTS`, by default sagl, with the methods of `subprocess.Popen` that tests need.

    Args:
        folder: its working directory.
        log: file to which its output is appended.
        arguments: the command line.
        variables: variables of the environment in addition to those of this process.
        module: the program.
        prepare: function that is called before the program, in its process.
    """

    def __init__(self, arguments, folder, log, variables=None, module="sagl.cli", prepare=None):
        environment = {**os.environ, **(variables or {})}
        arguments = [str(argument) for argument in arguments]
        self._process = CONTEXT.Process(target=_run, args=(module, arguments, folder, log, environment, prepare))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        assert self.poll() is not None, "timeout"
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def is_alive(pid):
    """Whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def import_from(folder):
    """Import modules of a folder before those of other places; `prepare` of a `Process`, as a partial function."""
    sys.path.insert(0, str(folder))


def run_program(arguments, folder, log, timeout=240, **options):
    """Run a program to its end, for at most so many seconds; return its exit code and its output."""
    process = Process(arguments, folder, log, **options)
    try:
        return process.wait(timeout), log.read_text()
    finally:
        process.send_signal(signal.SIGKILL)


def run_ranks(arguments, folder, environments, timeout=240, **options):
    """Run a program in one process for each environment; return the exit codes and the outputs."""
    logs = [folder / f"rank_{rank}.txt" for rank in range(len(environments))]
    runs = [
        Process(arguments, folder, log, variables, **options) for log, variables in zip(logs, environments, strict=True)
    ]
    try:
        return [(run.wait(timeout), log.read_text()) for run, log in zip(runs, logs, strict=True)]
    finally:
        for run in runs:
            run.send_signal(signal.SIGKILL)


def _run(module, arguments, folder, log, environment, prepare):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # that of a program which no fork server has started
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = [module, *arguments]
    if prepare:
        prepare()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
