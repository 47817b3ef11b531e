"""`checkpoints/last.ckpt`, written every so many steps and minutes, whole or not at all."""

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sagl.settings.training import SavingSettings


class LastCheckpoint(Checkpoint):
    """Saves all that a resume needs, under one name: after `every_n_steps`, after `every_minutes`, and at the end.

    The file is written beside its place and renamed, so that there is always a whole one.
    """

    def __init__(self, path: Path, settings: SavingSettings = SavingSettings()) -> None:  # noqa: B008 (frozen)
        """Where and how often.

        Args:
            path: the file, such as runs/shoes/checkpoints/last.ckpt.
            settings: steps and minutes between two saves.
        """
        self.path, self.settings = path, settings
        self._saved_step, self._saved_at = 0, time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step that was resumed."""
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Save where it is due. Rank 0's clock decides for all ranks."""
        steps_due = trainer.global_step - self._saved_step >= self.settings.save_every_steps
        time_due = time.monotonic() - self._saved_at >= 60 * self.settings.save_every_minutes
        if trainer.strategy.broadcast(steps_due or time_due):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of a run is its last checkpoint."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A polite end (SIGTERM) falls between two batches, and is saved; any other leaves the last whole file."""
        if isinstance(exception, SIGTERMException):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved_step and self.path.exists():
            return
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, self.path)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
