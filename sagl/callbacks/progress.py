"""Progress of `sagl fit`, `sagl validate` and `sagl test` on stderr."""

import re
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from sagl.modules.training_module import TrainingModule
from sagl.settings.sampling import ProgressKind
from sagl.utils.progress import ProgressReporter


class TrainingProgress(ProgressBar):
    """Shows steps, remaining time and loss: as a bar on a terminal, and every half minute as a line in a log.

    In a training, a line with the results follows every validation. Only rank 0 shows anything. It replaces Lightning's
    bar, which shows the batches of one epoch without the loss, and writes nothing to a log.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kind: ProgressKind = "auto"
        self._note = ""
        self._reporter = ProgressReporter(kind="off")

    def disable(self) -> None:
        self._kind = "off"

    def enable(self) -> None:
        self._kind = "auto"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at the step of a resumed training. Without a limit of steps and epochs, the total is not known."""
        num_steps = trainer.estimated_stepping_batches
        total = None if num_steps == float("inf") else int(num_steps)
        self._start(ProgressReporter("training", total, self._kind, "steps", trainer.global_step))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Count the optimiser's steps. The loss is read when loggers read it, as reading it makes a GPU wait."""
        assert isinstance(pl_module, TrainingModule)
        if pl_module.logs_this_step and "train/loss" in trainer.callback_metrics:
            skipped = f", {pl_module.num_skipped} batches skipped" if pl_module.num_skipped else ""
            self._note = f"loss {float(trainer.callback_metrics['train/loss']):.4f}{skipped}"
        self._reporter.update(trainer.global_step, note=self._note)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._start(ProgressReporter("validation", int(sum(trainer.num_val_batches)), self._kind, "batches"))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 (Lightning's own)
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batches: in `sagl validate` they are the whole, within a training a part of the present step."""
        if trainer.state.fn == "validate":
            self._reporter.advance()
        elif not trainer.sanity_checking:
            self.update_part("validation", batch_idx + 1, int(sum(trainer.num_val_batches)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the results of a validation within a training. Those by range of timesteps are for the logger only."""
        if trainer.state.fn == "validate":
            self._stop()
        elif not trainer.sanity_checking:
            self._reporter.hide_part()
            values = [
                f"{name.removeprefix('val/')} {float(value):.5g}"
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/") and not re.search(r"_q\d$", name)
            ]
            self._reporter.print(f"validation at step {trainer.global_step}: {', '.join(values)}")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(ProgressReporter("test", int(sum(trainer.num_test_batches)), self._kind, "batches"))

    def on_test_batch_end(self, *_: Any) -> None:  # noqa: ANN401 (Lightning's own)
        self._reporter.advance()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def update_part(self, title: str, completed: int, total: int) -> None:
        """Report the progress of a part of the present step, such as sampling previews."""
        self._reporter.update_part(title, completed, total)

    def _start(self, reporter: ProgressReporter) -> None:
        self._reporter = reporter
        reporter.__enter__()

    def _stop(self) -> None:
        self._reporter.__exit__()
