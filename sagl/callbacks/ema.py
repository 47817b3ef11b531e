"""An exponential moving average of the weights, kept by Lightning's `WeightAveraging`."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sagl.settings.training import SavingSettings


class WeightAverage(WeightAveraging):
    """Average of the weights with one decay; validation sees it, and a checkpoint's `state_dict` holds it.

    The raw weights are in the checkpoint's `current_model_state`, and in the module when training ends.
    """

    def __init__(self, settings: SavingSettings = SavingSettings()) -> None:  # noqa: B008 (frozen)
        """An average that forgets by `settings.average_decay` a step, and faster at first."""
        self.decay, self._in_place = settings.average_decay, False
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    def _average(self, averaged: Any, current: Any, num_averaged: Any) -> None:  # noqa: ANN401 (torch's own)
        """One update; young averages forget faster, so that the first weights do not linger."""
        n = int(num_averaged)
        get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))(averaged, current, num_averaged)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Weights and average take the trainer's precision before a checkpoint is read into them, not after."""
        trainer.precision_plugin.convert_module(pl_module)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average lives where the weights do."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average takes the weights' place."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._in_place = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The weights are back."""
        super().on_validation_epoch_end(trainer, pl_module)
        self._in_place = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A run that ends while it validates is put right before anything is saved."""
        if self._in_place:
            self.on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the raw weights in place: checkpoints hold both."""
