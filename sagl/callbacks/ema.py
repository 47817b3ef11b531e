"""Exponential moving averages (EMA) of the weights: one by Lightning's `WeightAveraging`, and further ones."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from sagl.settings.training import CheckpointSettings


def warmup_decay(decay: float, num_updates: int) -> float:
    """Return the EMA decay with warm-up, min(decay, (1 + n) / (10 + n)), so that initial weights are soon forgotten."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


def average_dtype(weight: Tensor) -> torch.dtype:
    """Return the data type of an average: at least float32, because 16 bits round small updates to nothing."""
    return torch.promote_types(weight.dtype, torch.float32)


@torch.no_grad()
def update_average(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float, num_updates: int) -> None:
    """Update an average in place after `num_updates` earlier updates; the first update copies the weights."""
    averages = list(average)
    sources = [weight.to(value.dtype) for weight, value in zip(weights, averages, strict=True)]
    effective_decay = warmup_decay(decay, num_updates) if num_updates else 0.0
    torch._foreach_lerp_(averages, sources, 1 - effective_decay)


class EMA(WeightAveraging):
    """EMA of the weights, in use during validation and saved as a checkpoint's `state_dict`.

    The raw weights are saved as `current_model_state`, and are in the module when training ends.
    """

    _raw_weights: list[Tensor] | None = None
    """Copies of the raw weights while the average is in the module."""

    def __init__(self, settings: CheckpointSettings = CheckpointSettings()) -> None:  # noqa: B008 (frozen)
        super().__init__(use_buffers=False)
        self.decay = settings.ema_decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the module to the trainer's precision before it is copied and a checkpoint is read into the copy."""
        trainer.precision_plugin.convert_module(pl_module)
        super().setup(trainer, pl_module, stage)
        for average in self._average_model.parameters() if self._average_model else ():
            average.data = average.data.to(average_dtype(average))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the average to the device of the weights, but not its number of updates, which every step reads."""
        assert self._average_model is not None
        num_updates = self._average_model.n_averaged.cpu()
        self._average_model.to(pl_module.device)
        self._average_model.n_averaged = num_updates

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Update once per optimiser step."""
        assert self._average_model is not None
        if trainer.global_step == self._latest_update_step:
            return
        average = self._average_model.module.parameters()
        update_average(average, pl_module.parameters(), self.decay, int(self._average_model.n_averaged))
        self._average_model.n_averaged += 1
        self._latest_update_step = trainer.global_step

    def _swap_models(self, pl_module: LightningModule) -> None:
        """Put the average into the module, or the raw weights back; the average itself is never rounded."""
        assert self._average_model is not None
        weights = list(pl_module.parameters())
        sources: Iterable[Tensor] = self._average_model.module.parameters()
        if self._raw_weights is not None:
            sources, self._raw_weights = self._raw_weights, None
        else:
            self._raw_weights = [weight.detach().clone() for weight in weights]
        for weight, source in zip(weights, sources, strict=True):
            weight.data.copy_(source.data)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the raw weights back if the run ends during validation."""
        if self._raw_weights is not None:
            self._swap_models(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the raw weights in the module; the base class would overwrite them with the average."""


class ExtraEMAs(Callback):
    """EMAs with the decays of `settings.extra_ema_decays`, saved as a checkpoint's `extra_emas`, by decay.

    The weights `ema:DECAY` of a checkpoint are read from there. Validation and previews do not use them.
    """

    def __init__(self, settings: CheckpointSettings) -> None:
        self.decays, self._num_updates, self._latest_step = settings.extra_ema_decays, 0, 0
        self._averages: dict[float, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights, or from the averages of the checkpoint, on the device of the weights."""
        self._latest_step = trainer.global_step
        for decay in self.decays:
            saved = self._averages.get(decay, {})
            self._averages[decay] = {
                name: saved.get(name, weight.detach()).to(weight.device, average_dtype(weight), copy=True)
                for name, weight in pl_module.named_parameters()
            }

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Update once per optimiser step; the first update copies the weights."""
        if trainer.global_step == self._latest_step:
            return
        for decay, average in self._averages.items():
            update_average(average.values(), pl_module.parameters(), decay, self._num_updates)
        self._num_updates, self._latest_step = self._num_updates + 1, trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.decays:
            checkpoint["extra_emas"] = {str(decay): average for decay, average in self._averages.items()}
            checkpoint["num_extra_ema_updates"] = self._num_updates

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read the saved averages; a decay that is new starts from the weights."""
        saved = checkpoint.get("extra_emas", {})
        self._averages = {decay: dict(saved[str(decay)]) for decay in self.decays if str(decay) in saved}
        self._num_updates = checkpoint.get("num_extra_ema_updates", 0)
