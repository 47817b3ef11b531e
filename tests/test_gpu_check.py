import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu_measures import _check_synchronisations
from sagl.utils.environment import has_fast_bfloat16

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
    assert ("SKIP fit in 16 bits" in summary) != has_fast_bfloat16()


@pytest.mark.parametrize("waits", [0, 2])
def test_the_notice_of_pytorch_s_debug_mode_is_not_counted_as_a_synchronisation(waits, monkeypatch):
    """The texts are those of PyTorch: c10/cuda/CUDAFunctions.cpp and torch/csrc/cuda/Module.cpp."""
    notice = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: warnings.warn(notice, stacklevel=1))
    results = []
    machine = SimpleNamespace(is_gpu=True, check=lambda passed, name, details: results.append((passed, details)))

    def step():
        for _ in range(waits):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    _check_synchronisations(machine, "a step", step)
    ((passed, details),) = results
    assert passed == (waits == 0)
    assert details.startswith(f"{waits} ")
    assert details.count(__file__) == waits
