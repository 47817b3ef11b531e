"""LightningModule of direction heads: loss of a batch, and explained variance on held-out chains."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from sagl.diffusion.timestep_samplers import UniformTimesteps
from sagl.models.direction_head import DirectionHead, Pairs
from sagl.modules.training_module import Batch, TrainingModule, seeded_init
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.direction_head import HeadTrainingSettings
from sagl.settings.network import HeadSettings
from sagl.shapes import PerSample

VALIDATION_BATCH = 256
"""Held-out steps that the head evaluates together."""


class PairSource(Protocol):
    """Source of pairs; see `sagl.sampling.direction_pairs.DirectionPairs`."""

    def to(self, device: torch.device) -> None: ...
    def levels(self) -> Tensor: ...
    def training_round(self, index: int, rank: int, world_size: int) -> Pairs: ...
    def validation_pairs(self, rank: int, world_size: int) -> Pairs: ...


class EmptyBatches:
    """Endless batches without content for the trainer's loop: a module that makes its data itself has only a size."""

    def __init__(self, batch_size: int, count: int | None = None) -> None:
        self.batch_size, self.count = batch_size, count

    def __iter__(self) -> Iterator[Batch]:
        index = 0
        while self.count is None or index < self.count:
            yield torch.zeros(self.batch_size), torch.zeros(self.batch_size)
            index += 1

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the module knows its position from the number of batches."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing."""


class DirectionHeadModule(TrainingModule):
    """Training of a direction head on the steps of guided chains of a frozen network.

    The loss is |h - d|² / rms(d | t)², the mean over pixels, with d = eps - eps of the weak prediction. A round of
    chains is sampled at a time, and `batches_per_round` batches are drawn from its steps. A resumed training samples
    the chains of its round again, so that checkpoints contain none.
    """

    network: DirectionHead
    settings: HeadTrainingSettings

    def __init__(
        self, settings: HeadTrainingSettings, head: HeadSettings, diffusion: DiffusionSettings, source: PairSource
    ) -> None:
        """Build the head.

        Args:
            settings: settings of the training.
            head: shape of the head.
            diffusion: process of the network.
            source: source of the pairs.
        """
        super().__init__(settings, diffusion)
        options = self.hparams.pop("direction_head")
        self.save_hyperparameters({"direction_head": asdict(head), "direction_head_training": options})
        self.source = source
        self.network = seeded_init(lambda: DirectionHead(head), settings.seed)
        self.timestep_sampler = UniformTimesteps(diffusion.num_timesteps)
        self._round: tuple[int, Pairs] | None = None
        self._validation_pairs: Pairs | None = None

    def on_fit_start(self) -> None:
        """Move the frozen network; measure the sizes of direction and inputs, unless a checkpoint has them."""
        self.source.to(self.device)
        if bool((self.network.levels == 1).all()):
            self.network.levels.data.copy_(self.source.levels())

    def train_dataloader(self) -> EmptyBatches:
        """Return batches of the right size without content."""
        return EmptyBatches(self.settings.direction_head.batch_size)

    def val_dataloader(self) -> EmptyBatches:
        """Return one batch, for which all held-out chains are evaluated."""
        return EmptyBatches(1, count=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch, or a loss without gradients if it is not finite.

        Raises:
            UserError: the loss was not finite too many times in a row.
        """
        index = self.trainer.fit_loop.total_batch_idx
        pairs = self._pairs_of_round(index // self.settings.direction_head.batches_per_round)
        generator = torch.Generator().manual_seed(index * self.trainer.world_size + self.global_rank)
        rows = torch.randint(len(pairs.timesteps), (len(batch[0]),), generator=generator)
        loss = self._losses(pairs.select(rows.to(pairs.timesteps.device)))[0].mean()
        return loss if self._log_if_finite({"loss": loss}) else self._zero_loss()

    def _pairs_of_round(self, index: int) -> Pairs:
        if self._round is None or self._round[0] != index:
            self._round = None  # frees the memory of the last round first
            self._round = index, self.source.training_round(index, self.global_rank, self.trainer.world_size)
        return self._round[1]

    def _losses(self, pairs: Pairs) -> tuple[PerSample, PerSample]:
        """Return the losses, and the energies of the targets in the same units: 2 x (B,)."""
        levels = self.network.levels_at(pairs.timesteps)[0, :, None, None, None]
        prediction = self._call_network(pairs.images, pairs.maps, pairs.timesteps)
        errors = ((prediction - pairs.direction) / levels).square().mean(dim=(1, 2, 3))
        return errors, (pairs.direction / levels).square().mean(dim=(1, 2, 3))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate losses and energies of all held-out chains."""
        if self._validation_pairs is None:
            self._validation_pairs = self.source.validation_pairs(self.global_rank, self.trainer.world_size)
        pairs = self._validation_pairs
        for rows in torch.arange(len(pairs.timesteps), device=pairs.timesteps.device).split(VALIDATION_BATCH):
            part = pairs.select(rows)
            losses, energies = self._losses(part)
            self._accumulate("loss", losses, part.timesteps)
            self._accumulate("energy", energies, part.timesteps)

    def on_validation_epoch_end(self) -> None:
        """Log the losses, and R² = 1 - loss / energy, over all timesteps (r2) and by range of them (r2_q0, …)."""
        energies = self._all_reduce(self._sums.pop("energy"), "sum").cpu()[:, 1]
        losses = self._all_reduce(self._sums["loss"], "sum").cpu()[:, 1]
        super().on_validation_epoch_end()
        self.log("val/r2", 1 - float(losses.sum() / energies.sum()))
        for q, (loss, energy) in enumerate(zip(losses.tolist(), energies.tolist(), strict=True)):
            if energy:
                self.log(f"val/r2_q{q}", 1 - loss / energy)
