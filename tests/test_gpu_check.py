import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu_check import LIMIT_SECONDS, SECTIONS
from benchmarks.gpu_measures import _check_synchronisations
from sagl.utils.environment import has_fast_bfloat16
from tests.helpers.processes import run_program

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_check_of_a_gpu_passes_on_a_cpu_and_lists_what_it_could_not_check(tmp_path):
    program = {"module": "benchmarks.gpu_check", "variables": {"SAGL_CACHE": str(tmp_path)}}
    limit = LIMIT_SECONDS * len(SECTIONS)
    code, output = run_program(["--device", "cpu", "--small"], ROOT, tmp_path / "output.txt", timeout=limit, **program)
    assert code == 0, output
    summary = output[output.index("=== summary") :]
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
