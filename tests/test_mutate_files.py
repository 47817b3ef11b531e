"""Damaged files of every kind, by the benchmark that makes many more of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_damage_of_any_file_gives_the_same_result_or_one_line():
    command = [sys.executable, "-m", "benchmarks.mutate_files", "--count", "68"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
