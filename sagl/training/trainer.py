"""Construction of Lightning's Trainer: its plugins, device and batches."""

from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar

from sagl.callbacks.checkpointing import AtomicCheckpointIO
from sagl.callbacks.progress import TrainingProgress
from sagl.errors import require, require_range
from sagl.settings.sampling import MAX_BATCH_SIZE, Accelerator, DeviceSettings
from sagl.utils.distributed import global_rank, report_unused_gpu, require_launcher, select_device
from sagl.utils.environment import gpu_has_bfloat16, has_fast_bfloat16

ACCELERATORS: dict[str, Accelerator] = {"auto": "auto", "cpu": "cpu", "gpu": "gpu", "cuda": "gpu"}
"""Accelerators of Lightning that a training may use, by what `sagl sample` calls them."""
UNSUPPORTED = {
    "overfit_batches": "every epoch is shuffled anew, so the same batches would not come again. To "
    "overfit, give `data` these images alone.",
    "reload_dataloaders_every_n_epochs": "a new data loader would begin with the first epoch again.",
}
"""Options of Lightning's Trainer that do not work with the data loaders of sagl, each with the reason."""


def fit_plugins(configured: Any) -> list[Any]:  # noqa: ANN401 (Lightning's own union)
    """Return the plugins of a training: the configured ones, and ours."""
    plugins = list(configured) if isinstance(configured, list | tuple) else [configured] if configured else []
    if SLURMEnvironment.detect() and not plugins:
        plugins.append(SLURMEnvironment(auto_requeue=False))  # Lightning's requeueing does not resume exactly
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpointIO())
    return plugins


def build_trainer(options: dict[str, Any], callbacks: list[Callback]) -> Trainer:
    """Build the trainer, with the callbacks of its options before our own."""
    extra = options.pop("callbacks") or []
    callbacks = [*(extra if isinstance(extra, list) else [extra]), *callbacks]
    require_launcher(DeviceSettings(num_nodes=options["num_nodes"]))
    options["use_distributed_sampler"] = False  # the data modules split the data among the ranks
    strategy = options["strategy"]
    require(
        not isinstance(strategy, str) or strategy.startswith(("auto", "ddp")),
        f"`trainer.strategy` must be auto or ddp, got {strategy}: a checkpoint is one file with all weights, and "
        "strategies that split the weights are not supported.",
    )
    for name, reason in UNSUPPORTED.items():
        require(not options.get(name), f"`trainer.{name}` must be 0, got {options.get(name)}: {reason}")
    if isinstance(options["accelerator"], str):
        options["accelerator"] = select_accelerator(options["accelerator"])
    if options["enable_checkpointing"] is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
    if options["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
        callbacks.append(TrainingProgress())
    trainer = Trainer(**options, callbacks=callbacks)
    interval = options.get("val_check_interval")
    require(
        trainer.world_size == 1 or interval is None or isinstance(interval, int | float),
        f"`trainer.val_check_interval` must be a number of batches or a fraction of an epoch for {trainer.world_size} "
        f"processes, whose clocks differ, got {interval}.",
    )
    return trainer


def select_accelerator(accelerator: str) -> str:
    """Return cuda if there is a GPU that can be used and is allowed, otherwise cpu.

    Raises:
        UserError: the accelerator is neither a GPU of CUDA nor the CPU, or is not there.
    """
    require(
        accelerator in ACCELERATORS,
        f"`trainer.accelerator` must be auto, cpu or gpu (CUDA), got {accelerator}: the noise schedule needs float64.",
    )
    device = select_device(DeviceSettings(accelerator=ACCELERATORS[accelerator]))
    if accelerator == "auto":
        report_unused_gpu(device)
    return device.type


def report_slow_precision(precision: str, device: torch.device) -> None:
    """Print a line if a precision of Lightning's Trainer is bfloat16 and the device has no such instructions."""
    is_gpu = device.type == "cuda"
    has_bfloat16 = gpu_has_bfloat16(device) if is_gpu else has_fast_bfloat16()
    if precision.startswith("bf16") and not has_bfloat16 and global_rank() == 0:
        name, other = ("GPU", "16-mixed") if is_gpu else ("CPU", "32-true")
        print(f"`trainer.precision` {precision} may be slow: this {name} has no bfloat16 that is known. Try {other}.")


def num_accumulated(global_batch_size: int, batch_size: int, trainer: Trainer) -> int:
    """Return the number of batches per optimiser step and process that make up the global batch.

    Raises:
        UserError: it is no whole number, or is set as well.
    """
    require(
        trainer.accumulate_grad_batches == 1,
        f"`trainer.accumulate_grad_batches` must be left out with `global_batch_size` {global_batch_size}, got "
        f"{trainer.accumulate_grad_batches}. Set global_batch_size to null to use it.",
    )
    require_range("data.batch_size", batch_size, 1, MAX_BATCH_SIZE)
    num_batches, rest = divmod(global_batch_size, batch_size * trainer.world_size)
    require(
        num_batches > 0 and rest == 0,
        f"`global_batch_size` must be a multiple of `data.batch_size` times the number of processes, {batch_size} "
        f"times {trainer.world_size}, got {global_batch_size}.",
    )
    return num_batches
