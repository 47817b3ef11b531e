"""A command that is killed at any event of the file system and repeated writes the bytes of one that was not killed."""

from pathlib import Path

import pytest

from tests.helpers.kill_points import COMMANDS
from tests.helpers.processes import run_program

NUM_POINTS = 12


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_killed_at_any_event_and_repeated_writes_the_same_bytes_and_leaves_nothing_behind(command, tmp_path):
    program = {"module": "tests.helpers.kill_points", "variables": {"OMP_NUM_THREADS": "1"}}
    code, output = run_program([command, NUM_POINTS], Path.cwd(), tmp_path / "output.txt", **program)
    assert code == 0, output
