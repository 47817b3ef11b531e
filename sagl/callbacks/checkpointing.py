"""Files of a training run: last.ckpt for an exact resume, the best checkpoints, and config.yaml."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor

from sagl.data.dataloader import ResumableDataLoader
from sagl.errors import require
from sagl.settings.training import CheckpointSettings, PreviewSettings
from sagl.utils.files import atomic_file, partial_pattern, remove_partial
from sagl.utils.signals import Interrupted

MAX_SAVING_SHARE = 0.05
"""Largest share of the time that saves every so many minutes may take; large checkpoints are saved less often."""


class SaveConfig(Callback):
    """Writes the configuration of a training to config.yaml; a resumed run overwrites it.

    Unfinished files of a killed run are removed before, here and among the previews.
    """

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            remove_partial(self.path.parent, partial_pattern(self.path), "previews/*")
            with atomic_file(self.path) as partial:
                partial.write_text(self.text, encoding="utf-8", errors="surrogateescape")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside their target and renames them. Lightning's own class writes to TMPDIR and copies."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Write a checkpoint completely or not at all.

        Raises:
            UserError: it cannot be written; the previous file is intact.
        """
        with atomic_file(Path(path)) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch replaces the error of the file system by one of its own
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


class ResumableCheckpoint(Checkpoint):
    """Saves last.ckpt, from which a resumed run continues exactly: periodically, at a stop signal and at the end.

    A save follows an optimiser step, so that no accumulated gradient is lost, and the validation due at that step. A
    stop signal, see `request_stop`, is handled at the next such moment by all ranks together. Lightning's own handler
    of SIGTERM may stop between two accumulated batches, and may let ranks wait for each other.
    """

    def __init__(self, path: Path, settings: CheckpointSettings = CheckpointSettings()) -> None:  # noqa: B008 (frozen)
        self.path, self.settings = path, settings
        self._step, self._saved_step, self._saved_time, self._save_seconds = 0, 0, time.monotonic(), 0.0
        self._stepped, self._stop_signal = False, 0

    # ------------------------------------------------------------------------------------------------------ when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def request_stop(self, number: int) -> None:
        """Save at the next opportunity and end the training; a handler for `on_stop_signal`."""
        self._stop_signal = number

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the resumed step and the loader's position, and remove unfinished files of a killed run.

        Lightning's epochs may be shorter than those of the loader (`limit_train_batches`), each of which begins one.
        """
        self._step = self._saved_step = trainer.global_step
        self._saved_time, self._stepped = time.monotonic(), False
        loader = trainer.train_dataloader
        if trainer.global_step and isinstance(loader, ResumableDataLoader):  # its batches may have another size now
            progress = trainer.fit_loop.epoch_loop.batch_progress.current
            position = loader.num_batches_of_epoch % trainer.num_training_batches
            progress.load_state_dict(dict.fromkeys(progress.state_dict(), position))
        if trainer.is_global_zero:
            remove_partial(self.path.parent, "*")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Save if it is due, after the logs, so that the curves of a killed run have no gap."""
        self._stepped, self._step = trainer.global_step > self._step, trainer.global_step
        if self._stepped and not _validation_follows(trainer) and self._should_save(trainer):
            trainer._logger_connector.update_train_step_metrics()
            self._save(trainer)
            self._stop_if_requested(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was due at the optimiser step before the validation."""
        if self._stepped and self._should_save(trainer):
            self._save(trainer)
            self._stop_if_requested(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._saved_step or not trainer.global_step:
            self._save(trainer)

    def _should_save(self, trainer: Trainer) -> bool:
        """Return whether any rank has a reason: clocks may differ, and a signal may reach one rank alone."""
        steps = trainer.global_step - self._saved_step >= self.settings.save_every_steps
        interval = max(60 * self.settings.save_every_minutes, self._save_seconds / MAX_SAVING_SHARE)
        minutes = time.monotonic() - self._saved_time >= interval
        due = steps or minutes or bool(self._stop_signal)
        return trainer.strategy.reduce_boolean_decision(due, all=False)

    def _stop_if_requested(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(bool(self._stop_signal), all=False):
            consequence = f"{self.path} is saved after step {trainer.global_step}, and `resume` continues from it"
            raise Interrupted(self._stop_signal or signal.SIGTERM, consequence)

    # ------------------------------------------------------------------------------------------------------ what

    def _save(self, trainer: Trainer) -> None:
        """Save unless the weights are damaged, which no resumed run could use.

        Raises:
            UserError: a weight is not finite, or the file cannot be written; the previous file is intact.
        """
        start_time = time.monotonic()
        remedy = f"resume from step {self._saved_step}" if self.path.exists() else "start again"
        require(
            all(bool(parameter.isfinite().all()) for parameter in trainer.lightning_module.parameters()),
            f"`model.optimizer.learning_rate` must keep the weights finite, and they are not after step "
            f"{trainer.global_step}. Lower it, or set trainer.gradient_clip_val, and {remedy}.",
        )
        trainer.save_checkpoint(self.path)
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()
        self._save_seconds = self._saved_time - start_time

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rewrite the progress of the loops so that a resumed run continues with the next batch.

        Lightning infers from the progress in which of six hooks a checkpoint was saved, and counts batches, epochs and
        logged steps accordingly; a run resumed at the end of an epoch would count one too many.
        """
        progress = checkpoint["loops"]["fit_loop"]
        batches, epochs = progress["epoch_loop.batch_progress"], progress["epoch_progress"]
        loader, num_started = trainer.train_dataloader, epochs["current"]["ready"]
        loader_ended = isinstance(loader, ResumableDataLoader) and not loader.num_batches_of_epoch
        epoch_ended = batches["is_last_batch"] or loader_ended
        num_batches, total = 0 if epoch_ended else batches["current"]["ready"], batches["total"]["ready"]
        checkpoint["epoch"] = num_ended = num_started if epoch_ended else num_started - 1
        counts = {"ready": num_started, "started": num_started, "processed": num_ended, "completed": num_ended}
        progress["epoch_progress"] = {"total": counts, "current": dict(counts)}
        batches["current"] = dict.fromkeys(batches["current"], num_batches)
        batches["total"] = dict.fromkeys(batches["total"], total) | {"started": total + 1}  # matches none of the hooks
        batches["is_last_batch"] = False
        progress["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - 1  # Lightning adds one


def _validation_follows(trainer: Trainer) -> bool:
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


class BestCheckpoints(ModelCheckpoint):
    """Keeps the checkpoints with the smallest finite val/frechet_SCALE, within a number and a limit on disk space."""

    def __init__(self, folder: Path, settings: PreviewSettings) -> None:
        super().__init__(
            dirpath=folder,
            filename="best_{step:08d}",
            auto_insert_metric_name=False,
            monitor=f"val/frechet_{settings.best_scale:g}",
            mode="min",
            save_top_k=settings.keep_best,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.max_bytes = settings.max_checkpoint_gb * 1e9

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        return current is not None and bool(current.isfinite()) and super().check_monitor_top_k(trainer, current)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the checkpoint if it is among the best, then remove the worst while all exceed the limit."""
        super().on_validation_end(trainer, pl_module)
        while len(self.best_k_models) > 1 and trainer.strategy.broadcast(self._num_bytes() > self.max_bytes):
            worst = max(self.best_k_models, key=lambda path: self.best_k_models[path])
            del self.best_k_models[worst]
            self._remove_checkpoint(trainer, worst)

    def _num_bytes(self) -> int:
        return sum(os.path.getsize(path) for path in self.best_k_models if os.path.exists(path))
