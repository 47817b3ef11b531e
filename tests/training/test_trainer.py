import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from sagl.callbacks.progress import TrainingProgress
from sagl.training.trainer import build_trainer, report_slow_precision, select_accelerator
from sagl.utils import environment
from sagl.utils.distributed import lightning_errors
from tests.helpers.errors import refused


@pytest.mark.parametrize(
    ("accelerator", "available", "expected"),
    [("auto", True, "cuda"), ("gpu", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu")],
)
def test_the_accelerator_is_a_gpu_of_cuda_or_the_cpu(accelerator, available, expected, monkeypatch):
    """Lightning alone would choose an Apple GPU, which has no float64."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    assert select_accelerator(accelerator) == expected


@pytest.mark.parametrize(
    ("device", "flags", "precision", "other"),
    [
        ("cpu", {"avx2"}, "bf16-mixed", "32-true"),
        ("cpu", {"avx2"}, "32-true", None),
        ("cpu", {"avx512_bf16"}, "bf16-mixed", None),
        ("cuda", {"avx512_bf16"}, "bf16-mixed", "16-mixed"),
        ("cuda", {"avx512_bf16"}, "16-mixed", None),
    ],
)
def test_a_precision_that_the_device_emulates_is_named_with_a_faster_one(
    device, flags, precision, other, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(environment, "_cpu_flags", lambda: flags)
    report_slow_precision(precision, torch.device(device))
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(f"Try {other}.") for line in lines] == ([True] if other else [])


def test_several_nodes_need_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    with refused("`trainer.num_nodes`", "2"):
        build_trainer({"callbacks": None, "num_nodes": 2, "strategy": "auto", "accelerator": "cpu"}, [])


@pytest.mark.parametrize(
    ("enabled", "own", "expected"),
    [(None, [], TrainingProgress), (None, [TQDMProgressBar()], TQDMProgressBar), (False, [], None)],
)
def test_progress_is_shown_by_one_callback_which_the_user_can_replace_or_disable(enabled, own, expected):
    options = {"callbacks": own, "num_nodes": 1, "strategy": "auto", "accelerator": "cpu", "logger": False}
    options |= {"enable_checkpointing": False, "enable_progress_bar": enabled}
    bars = [type(c) for c in build_trainer(options, []).callbacks if isinstance(c, ProgressBar)]
    assert bars == ([expected] if expected else [])


def test_a_division_by_zero_of_lightning_is_an_error_about_the_trainer():
    code = compile("1 / 0", "trainer.py", "exec")
    with refused("`trainer`", "zero"), lightning_errors():
        exec(code, {"__name__": "lightning.pytorch.loops"})
