"""Fixtures of all tests."""

import signal
from functools import cache

import pytest
import torch
from docstring_parser.attrdoc import AttributeDocstrings

from tests.helpers.commands import Fit
from tests.helpers.networks import small_unet

torch.set_num_threads(1)  # networks this small lose by a second thread, and one thread always adds in one order

# hundreds of parsers are built in one process, and most of the time goes into the source of the settings' classes
read_docstrings = cache(lambda cls, read=AttributeDocstrings.get_attr_docs: read(AttributeDocstrings(), cls))
AttributeDocstrings.get_attr_docs = lambda _, cls: read_docstrings(cls)

# nohup and background shells start processes with these ignored, and the children of the tests would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def unet():
    """A UNet of two levels at 16x16 with drawn weights."""
    return small_unet()


@pytest.fixture(scope="module")
def start():
    """`Fit`, whose processes do not outlive the tests of a module."""
    runs = []
    yield lambda *args, **kwargs: runs.append(Fit(*args, **kwargs)) or runs[-1]
    for run in runs:
        run.kill()


def pytest_collection_modifyitems(items):
    """Run the longest files and then those with slow tests, so that no worker is left with one of them at the end."""
    longest = ("test_fuzz.py", "test_gpu_check.py")
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in longest, item.path not in slow_files))


def pytest_terminal_summary(terminalreporter):
    """Print what tests recorded, so that a count which may be above zero is always seen."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties if report.when == "call" else []:
            terminalreporter.write_line(f"{report.nodeid.split('::')[-1]}: {name}: {value}")
