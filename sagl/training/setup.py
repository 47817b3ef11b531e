"""Module, data, callbacks and trainer of a training, validation or test, from a parsed configuration."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from sagl.callbacks.checkpointing import BestCheckpoints, ResumableCheckpoint, SaveConfig
from sagl.callbacks.ema import EMA, ExtraEMAs
from sagl.callbacks.loss_table import LossTable
from sagl.callbacks.sag_sampling import SAGPreviews
from sagl.errors import require
from sagl.guidance.registry import GUIDANCES
from sagl.models.pickles import load_training_checkpoint
from sagl.modules.classifier_module import ClassifierModule
from sagl.modules.diffusion_module import DiffusionModule
from sagl.modules.direction_head_module import DirectionHeadModule
from sagl.settings.direction_head import HeadTrainingSettings
from sagl.settings.sampling import SamplerSettings
from sagl.settings.training import CheckpointSettings, ClassifierTrainingSettings
from sagl.training.direction_head import build_head_module
from sagl.training.resume import check_same_parameters, report_changes
from sagl.training.trainer import build_trainer, fit_plugins, num_accumulated


class TrainingSetup(NamedTuple):
    """Arguments for `fit`, `validate` or `test` of the trainer."""

    trainer: Trainer
    module: DiffusionModule | ClassifierModule | DirectionHeadModule
    data: LightningDataModule | None
    resume_from: Path | None = None


def prepare_fit(parser: ArgumentParser, config: Namespace, settings: CheckpointSettings) -> TrainingSetup:
    """Build module, data and trainer of a training.

    Args:
        parser: parser of the configuration, which builds its objects.
        config: the parsed configuration.
        settings: the `CheckpointSettings` in it.

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
    decay_steps = init.model.optimizer.decay_steps
    require(
        not decay_steps or init.trainer.max_steps > 0 or init.trainer.fast_dev_run,
        f"`model.optimizer.decay_steps` {decay_steps} needs `trainer.max_steps`, which the steps are counted from, got "
        f"{init.trainer.max_steps}.",
    )
    module = _build_module(init)
    text = parser.dump(config, skip_unset=False)
    if saved is not None:
        check_same_parameters(saved, module.hparams)
        report_changes(output / "config.yaml", text)
    module.hparams["ema_decay"] = settings.ema_decay
    module.hparams["recommended"] = _recommended_settings(init, module)
    options = init.trainer.as_dict()
    callbacks = _fit_callbacks(init, settings, output, isinstance(module, DiffusionModule))
    if not options["fast_dev_run"]:
        callbacks.append(SaveConfig(output / "config.yaml", text))
    options["plugins"] = fit_plugins(options["plugins"])
    if getattr(init.get("data"), "num_validation", None) == 0:
        options["limit_val_batches"] = 0  # Lightning would count on validations, and saves would wait for them
    if options["logger"] is None:
        options["logger"] = not options["fast_dev_run"] and TensorBoardLogger(output, name="logs", version="")
    trainer = build_trainer({**options, "default_root_dir": str(output)}, callbacks)
    if init.global_batch_size is not None:
        batch_size = init.data.batch_size if "data" in init else init.model.direction_head.batch_size
        trainer.accumulate_grad_batches = num_accumulated(init.global_batch_size, batch_size, trainer)
    return TrainingSetup(trainer, module, init.get("data"), last if resumed else None)


def _fit_callbacks(init: Namespace, settings: CheckpointSettings, output: Path, has_previews: bool) -> list[Callback]:
    """Build the callbacks of a training; those that use the EMA weights during validation come before `EMA`.

    Those that write are left out of a trial with `trainer.fast_dev_run`.
    """
    is_trial = init.trainer.fast_dev_run
    preview = replace(init.preview, num_samples=0) if has_previews and is_trial else init.get("preview")
    callbacks: list[Callback] = [SAGPreviews(output, preview, init.sag)] if has_previews else []
    callbacks += [EMA(settings), ExtraEMAs(settings)]
    if is_trial:
        return callbacks
    if has_previews and init.preview.keep_best:
        callbacks.append(BestCheckpoints(output / "checkpoints", init.preview))
    return [*callbacks, ResumableCheckpoint(output / "checkpoints" / "last.ckpt", settings)]


def prepare_evaluation(parser: ArgumentParser, config: Namespace, command: str) -> TrainingSetup:
    """Build module, data and trainer of a validation or test; `command` is validate or test.

    Raises:
        UserError: the settings are not valid, `checkpoint` is missing, or there are no validation images.
    """
    require(config.checkpoint is not None, "`checkpoint` must be a file or a name, or `run` a folder, got neither.")
    init = parser.instantiate(config)
    require(
        command == "test" or getattr(init.data, "num_validation", None) != 0,
        "`data.num_validation` must be at least 1 to validate, got 0. Give the value of the training.",
    )
    module = _build_module(init)
    callbacks: list[Callback] = [LossTable()]
    if isinstance(module, DiffusionModule):
        callbacks.insert(0, SAGPreviews(Path(), replace(init.preview, num_samples=0), init.sag))
    trainer = build_trainer({**init.trainer.as_dict(), "logger": False}, callbacks)
    return TrainingSetup(trainer, module, init.data)


def _build_module(init: Namespace) -> DiffusionModule | ClassifierModule | DirectionHeadModule:
    if isinstance(init.model, HeadTrainingSettings):
        guidances = {name: init[name] for name in GUIDANCES}
        return build_head_module(init.model, guidances, init.checkpoint, init.weights)
    is_classifier = isinstance(init.model, ClassifierTrainingSettings)
    return ClassifierModule(init.model) if is_classifier else DiffusionModule(init.model)


def _recommended_settings(init: Namespace, module: LightningModule) -> dict[str, Any]:
    """Return the sampling settings that checkpoints recommend: those of the configuration that are no defaults.

    A direction head recommends the settings of its method that it was made for.
    """
    if isinstance(module, ClassifierModule):
        return {}
    if isinstance(module, DirectionHeadModule):
        method = init.model.direction_head.method
        return {method: init[method].weak_prediction_settings}
    sampler = {name: init[name] for name in asdict(SamplerSettings())}
    changed = {name: init[name] for name, entry in GUIDANCES.items() if init[name] != entry.settings_class()}
    return sampler | {name: asdict(settings) for name, settings in changed.items()}
