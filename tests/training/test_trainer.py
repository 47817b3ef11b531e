import pytest
import torch

from sagl.training.trainer import select_accelerator


@pytest.mark.parametrize(
    ("accelerator", "available", "expected"),
    [("auto", True, "cuda"), ("gpu", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu")],
)
def test_the_accelerator_is_a_gpu_of_cuda_or_the_cpu(accelerator, available, expected, monkeypatch, capsys):
    """Lightning alone would choose an Apple GPU, which has no float64."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    assert select_accelerator(accelerator, "bf16-mixed") == expected
    assert ("bf16-mixed" in capsys.readouterr().out) == (expected == "cuda")
