"""What every Lightning shell around a network in training has: random numbers, optimiser, skipped batches, logs."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW

from sagl.data.pixels import to_float
from sagl.diffusion.losses import TimestepSampler, spread_timesteps
from sagl.diffusion.noise import Streams, initial_noise, seed_dropout, timestep_generator, training_streams
from sagl.machine import peak_gigabytes
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.errors import require
from sagl.settings.training import OptimizerSettings
from sagl.shapes import Image, ImageUint8, Labels, PerSample, Timestep

Batch = tuple[ImageUint8, Labels]
Network = TypeVar("Network", bound=nn.Module)
QUARTERS = 4
"""Validation reports its loss in so many equal parts of the timesteps."""


def adamw(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> AdamW:
    """AdamW in one pass over memory."""
    s = settings
    optimizer = AdamW(parameters, lr=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay, fused=True)
    optimizer._step_supports_amp_scaling = False  # it could unscale gradients itself; Lightning clips what it unscaled
    return optimizer


def built_from_seed(build: Callable[[], Network], seed: int) -> Network:
    """A network whose first weights are drawn from the seed alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


class TrainingModule(LightningModule):
    """A network in training on noised images. A subclass builds `network` and says what a batch teaches it.

    Weights begin from the seed; what a sample is trained with is drawn from (seed, batch, its place in the batch of all
    ranks together), so that it is the same for any number of ranks. Dropout alone is drawn from (seed, batch, rank).
    """

    network: nn.Module
    diffusion_settings: DiffusionSettings
    timestep_sampler: TimestepSampler

    def __init__(self, optimizer: OptimizerSettings, max_skipped: int, seed: int) -> None:
        """What does not depend on the network.

        Args:
            optimizer: AdamW and its rate.
            max_skipped: a batch whose loss is not finite is skipped; after so many in a row the training ends.
            seed: of all that is drawn.

        Raises:
            UserError: `max_skipped` is below 0.
        """
        super().__init__()
        require(max_skipped >= 0, f"`max_skipped` must be at least 0, got {max_skipped}.")
        self.optimizer_settings, self.seed = optimizer, seed
        self._batch_ended: float | None = None
        self.max_skipped, self.skipped, self.skipped_in_a_row = max_skipped, 0, 0
        self._learned, self._validated = False, 0
        self._sums: dict[str, Tensor] = {}

    def _images(self, images: ImageUint8) -> Image:
        """In float32, or in float64 if the network is."""
        dtype = next(self.network.parameters()).dtype
        return to_float(images).to(torch.promote_types(dtype, torch.float32))

    def _drawn(self, count: int) -> tuple[Streams, Timestep, PerSample]:
        """For one batch: a stream for each of this rank's samples, and timesteps and weights of those of all ranks."""
        rank, ranks, number = self.global_rank, self.trainer.world_size, self.trainer.fit_loop.total_batch_idx
        seed_dropout(self.seed, number, rank)
        streams = training_streams(self.seed, number, range(rank, count * ranks, ranks))
        return streams, *self.timestep_sampler.sample(count * ranks, timestep_generator(self.seed, number))

    def _mine(self, of_all_ranks: Tensor) -> Tensor:
        """(B · ranks,) by place in the whole batch -> (B,), this rank's."""
        return of_all_ranks[self.global_rank :: self.trainer.world_size]

    def _of_all_ranks(self, values: Tensor) -> Tensor:
        """(B,) of every rank -> (B · ranks,) by place in the whole batch, so that all ranks learn alike."""
        if self.trainer.world_size == 1:
            return values
        gathered: Tensor = self.trainer.strategy.all_gather(values)
        return gathered.T.flatten()

    def _of_ranks(self, values: Tensor, kind: str) -> Tensor:
        """Mean or sum of what every rank has its own of."""
        if self.trainer.world_size == 1:
            return values
        reduced: Tensor = self.trainer.strategy.reduce(values.to(self.device), reduce_op=kind)
        return reduced

    def _taught(self, loss: Tensor, values: Mapping[str, Tensor]) -> bool:
        """Log the means over ranks of the loss and of other values; whether it is finite, and trains.

        Raises:
            UserError: too many in a row were not.
        """
        means = self._of_ranks(torch.stack([loss, *values.values()]).detach(), "mean")
        if not self._is_finite(means[0]):
            return False
        self._learned = True
        self.log_dict({f"train/{name}": mean for name, mean in zip(("loss", *values), means, strict=True)})
        self.log("train/rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return True

    def _nothing(self) -> Tensor:
        """A loss that trains nothing, on every rank alike."""
        return torch.stack([0 * p.sum() for p in self.network.parameters() if p.requires_grad]).sum()

    def _is_finite(self, loss: Tensor) -> bool:
        """Whether the mean loss of all ranks is finite, and so each of them; the skipped are counted."""
        skipped = not bool(torch.isfinite(loss))
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        require(
            self.skipped_in_a_row <= self.max_skipped,
            f"`model.max_skipped` allows {self.max_skipped} batches in a row whose loss is not finite, and there are "
            "more. Lower model.optimizer.learning_rate, or set trainer.gradient_clip_val, and --resume.",
        )
        self.log("train/skipped", float(self.skipped))
        return not skipped

    # ---------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self._validated, self._sums = 0, {}

    def _shown(self, x_0: Image) -> tuple[Timestep, Image]:
        """What validation shows of a batch: each image at a timestep and noise that stay its own for any world size."""
        places = range(self._validated, self._validated + len(x_0))
        ids = [place * self.trainer.world_size + self.global_rank for place in places]
        self._validated += len(x_0)
        return spread_timesteps(ids, self.diffusion_settings.num_timesteps), initial_noise(0, ids, x_0.shape[1:])

    def _add(self, name: str, values: PerSample, timesteps: Timestep) -> None:
        """(B,) values to the mean val/NAME and to those of the quarters of the timesteps."""
        sums = self._sums.setdefault(name, torch.zeros(QUARTERS, 2, dtype=torch.float64))
        rows = torch.stack([torch.ones_like(values), values], dim=1).double().cpu()
        sums.index_add_(0, timesteps.cpu() * QUARTERS // self.diffusion_settings.num_timesteps, rows)

    def on_validation_epoch_end(self) -> None:
        """Means of all ranks, whole and by quarter of the timesteps (0 the cleanest)."""
        for name, mine in self._sums.items():
            sums = self._of_ranks(mine, "sum").cpu()
            images, total = sums.sum(dim=0).tolist()
            self.log(f"val/{name}", total / images)
            for q, (inside, of_quarter) in enumerate(sums.tolist()):
                if inside:
                    self.log(f"val/{name}_quarter_{q}", of_quarter / inside)
            if name == "loss" and self.trainer.state.fn != "fit":
                self.log("val/images", images)

    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation, of other images."""
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 (Lightning's own union)
        """AdamW; the rate as `OptimizerSettings.rate_factor` has it, step by step."""
        s = self.optimizer_settings
        optimizer = adamw((p for p in self.network.parameters() if p.requires_grad), s)
        max_steps = self.trainer.max_steps
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: s.rate_factor(step, max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    # ---------------------------------------------------------------------------------------------------- logs

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:  # noqa: ANN401 (Lightning's own)
        """How fast it goes, data and all, and the most memory held so far."""
        now = time.monotonic()
        if self._batch_ended is not None:
            images = len(batch[0]) * self.trainer.world_size
            self.log("train/images_per_second", images / (now - self._batch_ended))
        self._batch_ended = now
        self.log("train/peak_gigabytes", peak_gigabytes())

    def on_validation_end(self) -> None:
        """The time of validation is no training time."""
        self._batch_ended = None

    def on_before_optimizer_step(self, optimizer: Any) -> None:  # noqa: ANN401 (Lightning's own)
        """The norm of the gradient, before it is clipped; without one, if all that was accumulated was skipped."""
        if not self._learned:
            optimizer.zero_grad()  # gradients of 0 would still let AdamW's running means move the weights
        self._learned = False
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        if gradients:
            self.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))

    # --------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """How many batches were skipped."""
        checkpoint["skipped"], checkpoint["skipped_in_a_row"] = self.skipped, self.skipped_in_a_row

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count on."""
        self.skipped, self.skipped_in_a_row = checkpoint.get("skipped", 0), checkpoint.get("skipped_in_a_row", 0)
