import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


@pytest.mark.slow
def test_the_check_of_a_gpu_passes_on_a_cpu_and_lists_what_it_could_not_check(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small"]
    environment = os.environ | {"SAGL_CACHE": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout
    summary = result.stdout[result.stdout.index("=== summary") :]
    assert "PASS" in summary
    assert "SKIP memory of a training" in summary
