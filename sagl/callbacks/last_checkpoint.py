"""`checkpoints/last.ckpt`: between two steps, whole or not at all, so that a run may be killed at any moment."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sagl.settings.training import CheckpointSettings


class ResumableCheckpoint(Checkpoint):
    """Saves all that a resume needs, under one name: after so many steps or minutes, at SIGTERM and at the end.

    Always right behind an optimiser step, so that no gradient is under way, and behind the validation that is due at
    it, so that a resume leaves none out. The file is written beside its place and renamed. SIGTERM is answered at the
    next such moment, by all ranks together, in place of Lightning's own handler, which may come between two batches
    whose gradients are accumulated and lets ranks wait for each other.
    """

    def __init__(self, path: Path, settings: CheckpointSettings = CheckpointSettings()) -> None:  # noqa: B008 (frozen)
        """Where and how often.

        Args:
            path: the file, such as runs/shoes/checkpoints/last.ckpt.
            settings: steps and minutes between two saves.
        """
        self.path, self.settings = path, settings
        self._step, self._saved_step, self._saved_at = 0, 0, time.monotonic()
        self._stepped, self._asked = False, False

    # ------------------------------------------------------------------------------------------------------ when

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step that was resumed; listen; clear away what a killed run had begun to write."""
        self._step = self._saved_step = trainer.global_step
        self._saved_at, self._stepped, self._asked = time.monotonic(), False, trainer.received_sigterm
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask)  # Lightning restores the handlers of before at the end
        if trainer.is_global_zero:
            for begun in self.path.parent.glob("*.partial"):
                begun.unlink()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Save where it is due, and the logs before it: a curve whose run is killed has no gap."""
        self._stepped, self._step = trainer.global_step > self._step, trainer.global_step
        if self._stepped and not _validation_follows(trainer) and self._due(trainer):
            trainer._logger_connector.update_train_step_metrics()
            self._save(trainer)
            self._end_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was due at the step before."""
        if self._stepped and self._due(trainer):
            self._save(trainer)
            self._end_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of a run is its last checkpoint."""
        if trainer.global_step > self._saved_step or not trainer.global_step:
            self._save(trainer)

    def _ask(self, *_: Any) -> None:  # noqa: ANN401 (a signal and its frame)
        self._asked = True

    def _due(self, trainer: Trainer) -> bool:
        """Whether any rank has a reason: the clocks may differ, and SIGTERM may reach one alone."""
        steps = trainer.global_step - self._saved_step >= self.settings.save_every_steps
        minutes = time.monotonic() - self._saved_at >= 60 * self.settings.save_every_minutes
        return trainer.strategy.reduce_boolean_decision(steps or minutes or self._asked, all=False)

    def _end_if_asked(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            raise SIGTERMException  # ends all that Lightning has begun, and the process with exit code 0

    # ------------------------------------------------------------------------------------------------------ what

    def _save(self, trainer: Trainer) -> None:
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, self.path)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say where the run stands so that Lightning goes on with the next batch, whatever the moment.

        Left alone, it takes the moment of saving for one of six and counts batches, epochs and logged steps by it; a
        run resumed at the end of an epoch then counts one too many.
        """
        progress = checkpoint["loops"]["fit_loop"]
        batches, epochs = progress["epoch_loop.batch_progress"], progress["epoch_progress"]
        ended, begun = batches["is_last_batch"], epochs["current"]["ready"]
        seen, total = 0 if ended else batches["current"]["ready"], batches["total"]["ready"]
        checkpoint["epoch"] = done = begun if ended else begun - 1
        counted = {"ready": begun, "started": begun, "processed": done, "completed": done}
        progress["epoch_progress"] = {"total": counted, "current": dict(counted)}
        batches["current"] = dict.fromkeys(batches["current"], seen)
        batches["total"] = dict.fromkeys(batches["total"], total) | {"started": total + 1}  # of none of its moments
        batches["is_last_batch"] = False
        progress["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - 1  # it adds one


def _validation_follows(trainer: Trainer) -> bool:
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
