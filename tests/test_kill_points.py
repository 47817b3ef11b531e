"""A command that is killed at any event of the file system and repeated writes the bytes of one that was not killed."""

import os
import subprocess
import sys

import pytest

from tests.helpers.kill_points import COMMANDS

NUM_POINTS = 12


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_killed_at_any_event_and_repeated_writes_the_same_bytes_and_leaves_nothing_behind(command):
    program = [sys.executable, "-m", "tests.helpers.kill_points", command, str(NUM_POINTS)]
    process = subprocess.run(
        program, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
