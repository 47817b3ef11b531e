"""Exponential moving averages of the weights: one kept by Lightning's `WeightAveraging`, further ones beside it."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sagl.settings.training import CheckpointSettings


def _young(decay: float, updates: int) -> float:
    """The decay of an average of so many updates, which forgets faster while there are few."""
    return min(decay, (1 + updates) / (10 + updates))


class EMA(WeightAveraging):
    """Average of the weights with one decay; validation sees it, and a checkpoint's `state_dict` holds it.

    The raw weights are in the checkpoint's `current_model_state`, and in the module when training ends.
    """

    def __init__(self, settings: CheckpointSettings = CheckpointSettings()) -> None:  # noqa: B008 (frozen)
        """An average that forgets by `settings.ema_decay` a step, and faster at first."""
        self.decay, self._in_place = settings.ema_decay, False
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    def _average(self, averaged: Any, current: Any, num_averaged: Any) -> None:  # noqa: ANN401 (torch's own)
        """One update; young averages forget faster, so that the first weights do not linger."""
        get_ema_multi_avg_fn(_young(self.decay, int(num_averaged)))(averaged, current, num_averaged)

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


class ExtraEMAs(Callback):
    """Averages with other decays, `settings.extra_ema_decays`; a checkpoint's `extra_emas` holds them, by decay.

    They are read as --weights ema:DECAY. Nothing is sampled from them while training.
    """

    def __init__(self, settings: CheckpointSettings) -> None:
        """As many as there are decays."""
        self.decays, self._updates, self._step = settings.extra_ema_decays, 0, 0
        self._averages: dict[float, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin from the weights, or where the checkpoint left off; beside the weights in either case."""
        self._step = trainer.global_step
        for decay in self.decays:
            mine = self._averages.get(decay, {})
            self._averages[decay] = {
                name: mine[name].to(value) if name in mine else value.detach().clone()
                for name, value in pl_module.named_parameters()
            }

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ANN401
        """One update a step of the optimiser; the first takes the weights as they are."""
        if trainer.global_step == self._step:
            return
        current = [parameter.detach() for parameter in pl_module.parameters()]
        for decay, averages in self._averages.items():
            kept = _young(decay, self._updates) if self._updates else 0.0
            torch._foreach_lerp_(list(averages.values()), current, 1 - kept)
        self._updates, self._step = self._updates + 1, trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """All of them, and how many updates they have seen."""
        if self.decays:
            checkpoint["extra_emas"] = {str(decay): averages for decay, averages in self._averages.items()}
            checkpoint["num_extra_ema_updates"] = self._updates

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with those that are there; a decay that was not asked for before begins from the weights."""
        held = checkpoint.get("extra_emas", {})
        self._averages = {decay: dict(held[str(decay)]) for decay in self.decays if str(decay) in held}
        self._updates = checkpoint.get("num_extra_ema_updates", 0)
