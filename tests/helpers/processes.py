"""Processes of the command line, forked from a server that has imported the libraries, but nothing of sagl.

They save the seconds in which a new interpreter imports PyTorch and Lightning.
"""

import multiprocessing
import os
import signal
import sys
from importlib import import_module

LIBRARIES = ["lightning.pytorch", "lightning.pytorch.cli", "torchvision", "torch._dynamo", "torch.utils.tensorboard"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(LIBRARIES)


class Command:
    """A command of sagl in a process of its own, with the methods of `subprocess.Popen` that tests need.

    Args:
        folder: its working directory.
        log: file to which its output is appended.
        arguments: the command line.
        variables: variables of the environment in addition to those of this process.
        package: folder of another copy of sagl.
        prepare: function that is called before the command, in its process.
    """

    def __init__(self, arguments, folder, log, variables=None, package=None, prepare=None):
        environment = {**os.environ, **(variables or {})}
        arguments = [str(argument) for argument in arguments]
        self._process = CONTEXT.Process(target=_run, args=(arguments, folder, log, environment, package, prepare))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        assert self.returncode is not None, "timeout"
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def run_command(arguments, folder, log, **options):
    """Run a command; return its exit code and its output."""
    command = Command(arguments, folder, log, **options)
    try:
        return command.wait(240), log.read_text()
    finally:
        command.send_signal(signal.SIGKILL)


def _run(arguments, folder, log, environment, package, prepare):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if package:
        sys.path.insert(0, str(package))
    sys.argv = ["sagl", *arguments]
    if prepare:
        prepare()
    sys.exit(import_module("sagl.cli").main(arguments))
