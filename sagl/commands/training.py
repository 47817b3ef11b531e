"""Training, validation and test with Lightning's Trainer, from a parsed configuration."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from traceback import walk_tb
from typing import Any, NamedTuple

from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger

from sagl.callbacks.checkpointing import AtomicCheckpointIO, BestCheckpoints, ResumableCheckpoint, SaveConfig
from sagl.callbacks.ema import EMA, ExtraEMAs
from sagl.callbacks.loss_table import LossTable
from sagl.callbacks.sag_sampling import SAGPreviews
from sagl.commands._parser import Parser, field_names, from_namespace
from sagl.commands._resume import check_same_parameters, report_changes
from sagl.errors import UserError, require
from sagl.guidance.registry import GUIDANCES
from sagl.models.checkpoints import load_training_checkpoint, read_state_dict
from sagl.models.loading import load
from sagl.models.transfer import load_pretrained_weights
from sagl.modules.classifier_module import ClassifierModule
from sagl.modules.diffusion_module import DiffusionModule
from sagl.settings.sampling import Accelerator, DeviceSettings, SamplerSettings
from sagl.settings.training import CheckpointSettings, ClassifierTrainingSettings
from sagl.utils.distributed import exit_when_parent_dies, global_rank, report_unused_gpu, select_device
from sagl.utils.environment import (
    disable_malloc_trim,
    disable_tf32,
    gpu_has_bfloat16,
    refuse_out_of_memory,
    set_threads,
)
from sagl.utils.files import NO_SPACE, file_errors
from sagl.utils.run_lock import lock_folder
from sagl.utils.signals import on_stop_signal

IGNORED_MESSAGES = ("💡 Tip", "TPU available: False", "`weights_only` was not set")
"""Prefixes of messages of Lightning that are not shown, because users cannot act on them."""
ACCELERATORS: dict[str, Accelerator] = {"auto": "auto", "cpu": "cpu", "gpu": "gpu", "cuda": "gpu"}
"""Accelerators of Lightning that a training may use, by what `sagl sample` calls them."""
MEMORY_HINT = ("data.batch_size", "`model.use_checkpoint` saves memory, too. ")
WEIGHT_SUFFIXES = (".pt", ".ckpt", ".safetensors")


class TrainingSetup(NamedTuple):
    """Arguments for `fit`, `validate` or `test` of the trainer."""

    trainer: Trainer
    module: DiffusionModule | ClassifierModule
    data: LightningDataModule
    resume_from: Path | None = None


def run(command: str, parser: Parser, config: Namespace) -> None:
    """Run `fit`, `validate` or `test`.

    Raises:
        UserError: the settings are not valid; nothing has been written.
    """
    disable_malloc_trim()
    disable_tf32()
    set_threads()
    if global_rank() > 0:
        exit_when_parent_dies()
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's own use of torch
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # of a resumed run
    for handler in logging.getLogger("lightning.pytorch").handlers:
        handler.addFilter(lambda record: not record.getMessage().startswith(IGNORED_MESSAGES))
    if command != "fit":
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with trainer_errors():
        if command == "fit":
            require(config.output is not None, "`output` must be a folder, got none.")
            writes = global_rank() == 0 and not config.trainer.fast_dev_run
            with lock_folder(Path(config.output)) if writes else nullcontext():
                fit(parser, config)
            return
        trainer, module, data, _ = prepare_evaluation(parser, config)
        _load_weights(module, config.checkpoint, config.weights)
        with refuse_out_of_memory(*MEMORY_HINT):
            (trainer.validate if command == "validate" else trainer.test)(module, data, verbose=False)


def fit(parser: Parser, config: Namespace) -> None:
    """Train. The caller holds the folder.

    Raises:
        UserError: the settings are not valid, or the disk is full.
        Interrupted: a stop signal ended the training after a save.
    """
    trainer, module, data, resume_from = prepare_fit(parser, config)
    if config.checkpoint and resume_from is None:
        _load_weights(module, config.checkpoint, config.weights)
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ResumableCheckpoint)]
    with (
        file_errors(Path(config.output), numbers=NO_SPACE),  # of a logger
        refuse_out_of_memory(*MEMORY_HINT),
        on_stop_signal(savers[0].request_stop) if savers else nullcontext(),
    ):
        trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)


@contextmanager
def trainer_errors() -> Iterator[None]:
    """Convert errors about the trainer's settings to a UserError: those that Lightning's own code raises."""
    try:
        yield
    except UserError:
        raise
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raised_in = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)][-1]
        if not raised_in.startswith("lightning."):
            raise
        raise UserError(f"`trainer` has settings that cannot be used: {error}") from error


def prepare_fit(parser: Parser, config: Namespace) -> TrainingSetup:
    """Build module, data and trainer of a training.

    Raises:
        UserError: the settings are not valid, the folder holds a run and `resume` is false, or its last checkpoint
            cannot be read.
    """
    output = Path(config.output)
    last = output / "checkpoints" / "last.ckpt"
    resumed = config.resume and last.exists()
    require(
        resumed or not last.exists(),
        f"`output` must be a new folder unless `resume` is true, and {output} holds a run.",
    )
    saved = load_training_checkpoint(last)["hyper_parameters"] if resumed else None
    init = parser.instantiate(config)
    module = _build_module(init)
    text = parser.dump(config, skip_unset=False)
    if saved is not None:
        check_same_parameters(saved, module.hparams)
        report_changes(output / "config.yaml", text)
    module.hparams["ema_decay"] = config.ema_decay
    module.hparams["recommended"] = _sampling_settings(init) if isinstance(module, DiffusionModule) else {}
    options = init.trainer.as_dict()
    callbacks = _fit_callbacks(init, output, isinstance(module, DiffusionModule))
    if not options["fast_dev_run"]:
        callbacks.append(SaveConfig(output / "config.yaml", text))
    options["plugins"] = _fit_plugins(options["plugins"])
    if options["logger"] is None:
        options["logger"] = not options["fast_dev_run"] and TensorBoardLogger(output, name="logs", version="")
    trainer = _build_trainer({**options, "default_root_dir": str(output)}, callbacks)
    if init.global_batch_size is not None:
        trainer.accumulate_grad_batches = _num_accumulated(init.global_batch_size, init.data.batch_size, trainer)
    return TrainingSetup(trainer, module, init.data, last if resumed else None)


def _fit_plugins(configured: Any) -> list[Any]:  # noqa: ANN401 (Lightning's own union)
    """Return the plugins of a training: the configured ones, and ours."""
    plugins = list(configured) if isinstance(configured, list | tuple) else [configured] if configured else []
    if SLURMEnvironment.detect() and not plugins:
        plugins.append(SLURMEnvironment(auto_requeue=False))  # Lightning's requeueing does not resume exactly
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpointIO())
    return plugins


def _fit_callbacks(init: Namespace, output: Path, has_previews: bool) -> list[Callback]:
    """Build the callbacks of a training; those that use the EMA weights during validation come before `EMA`.

    Those that write are left out of a trial with `trainer.fast_dev_run`.
    """
    settings, folder, is_trial = (
        from_namespace(CheckpointSettings, init),
        output / "checkpoints",
        init.trainer.fast_dev_run,
    )
    preview = replace(init.preview, num_samples=0) if has_previews and is_trial else init.get("preview")
    callbacks: list[Callback] = [SAGPreviews(output, preview, init.sag)] if has_previews else []
    callbacks += [EMA(settings), ExtraEMAs(settings)]
    if is_trial:
        return callbacks
    if has_previews and init.preview.keep_best:
        callbacks.append(BestCheckpoints(folder, init.preview))
    return [*callbacks, ResumableCheckpoint(folder / "last.ckpt", settings)]


def prepare_evaluation(parser: Parser, config: Namespace) -> TrainingSetup:
    """Build module, data and trainer of a validation or test.

    Raises:
        UserError: the settings are not valid, or `checkpoint` is missing.
    """
    require(config.checkpoint is not None, "`checkpoint` must be a file or a name, or `run` a folder, got neither.")
    init = parser.instantiate(config)
    module = _build_module(init)
    callbacks: list[Callback] = [LossTable()]
    if isinstance(module, DiffusionModule):
        callbacks.insert(0, SAGPreviews(Path(), replace(init.preview, num_samples=0), init.sag))
    trainer = _build_trainer({**init.trainer.as_dict(), "logger": False}, callbacks)
    return TrainingSetup(trainer, module, init.data)


def _build_module(init: Namespace) -> DiffusionModule | ClassifierModule:
    is_classifier = isinstance(init.model, ClassifierTrainingSettings)
    return ClassifierModule(init.model) if is_classifier else DiffusionModule(init.model)


def _build_trainer(options: dict[str, Any], callbacks: list[Callback]) -> Trainer:
    """Build the trainer, with the callbacks of its options before our own."""
    extra = options.pop("callbacks") or []
    callbacks = [*(extra if isinstance(extra, list) else [extra]), *callbacks]
    options["use_distributed_sampler"] = False  # the data modules split the data among the ranks
    strategy = options["strategy"]
    require(
        not isinstance(strategy, str) or strategy.startswith(("auto", "ddp")),
        f"`trainer.strategy` must be auto or ddp, got {strategy}: a checkpoint is one file with all weights, and "
        "strategies that split the weights are not supported.",
    )
    if isinstance(options["accelerator"], str):
        options["accelerator"] = _select_accelerator(options["accelerator"], str(options["precision"]))
    if options["enable_checkpointing"] is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
    return Trainer(**options, callbacks=callbacks)


def _select_accelerator(accelerator: str, precision: str) -> str:
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
    if precision.startswith("bf16") and device.type == "cuda" and not gpu_has_bfloat16(device):
        print(f"`trainer.precision` {precision} is slow on this GPU, which does not compute in bfloat16: use 16-mixed.")
    return device.type


def _num_accumulated(global_batch_size: int, batch_size: int, trainer: Trainer) -> int:
    """Return the number of batches per optimiser step and process that make up the global batch.

    Raises:
        UserError: it is no whole number, or is set as well.
    """
    require(
        trainer.accumulate_grad_batches == 1,
        f"`trainer.accumulate_grad_batches` must be left out with `global_batch_size` {global_batch_size}, got "
        f"{trainer.accumulate_grad_batches}. Set global_batch_size to null to use it.",
    )
    num_batches, rest = divmod(global_batch_size, batch_size * trainer.world_size)
    require(
        num_batches > 0 and rest == 0,
        f"`global_batch_size` must be a multiple of `data.batch_size` times the number of processes, {batch_size} "
        f"times {trainer.world_size}, got {global_batch_size}.",
    )
    return num_batches


def _sampling_settings(init: Namespace) -> dict[str, Any]:
    """Return the sampling settings of the configuration, which checkpoints recommend."""
    sampler = {name: init[name] for name in field_names(SamplerSettings)}
    return sampler | {name: asdict(init[name]) for name in GUIDANCES}


def _load_weights(module: DiffusionModule | ClassifierModule, checkpoint: str, weights: str) -> None:
    """Load initial weights from a file, or of a released network by its name.

    Raises:
        UserError: the checkpoint cannot be read, or has weights of other shapes.
    """
    path = Path(checkpoint)
    is_file = path.suffix in WEIGHT_SUFFIXES or path.is_file()
    state = read_state_dict(path, weights) if is_file else load(checkpoint, weights).state_dict
    if message := load_pretrained_weights(module.network, state):
        print(message)
