"""What every Lightning shell around a network in training has: random numbers, optimiser, skipped batches, logs."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW

from sagl.diffusion.noise import SampleRngs, batch_rngs, initial_noise, randn, seed_dropout, timestep_generator
from sagl.diffusion.timestep_samplers import UniformTimesteps, van_der_corput_timesteps
from sagl.errors import require
from sagl.models.cpu_kernels import optimize_for_cpu
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.training import OptimizerSettings
from sagl.shapes import Image, ImageUint8, Labels, PerSample, Timestep
from sagl.utils.environment import peak_gigabytes
from sagl.utils.images import to_float

Batch = tuple[ImageUint8, Labels]
Network = TypeVar("Network", bound=nn.Module)
NUM_TIMESTEP_BINS = 4
"""Validation reports its loss in so many equal parts of the timesteps."""


def adamw(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> AdamW:
    """AdamW in one pass over memory."""
    s = settings
    optimizer = AdamW(parameters, lr=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay, fused=True)
    optimizer._step_supports_amp_scaling = False  # it could unscale gradients itself; Lightning clips what it unscaled
    return optimizer


def seeded_init(build: Callable[[], Network], seed: int) -> Network:
    """A network whose first weights are drawn from the seed alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return optimize_for_cpu(build())


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a training step draws for the images of this rank, and of the timesteps for those of all."""

    timesteps: Timestep
    """(B,)."""
    weights: PerSample
    """(B,): what the losses at these timesteps count."""
    everywhere: Timestep
    """(B · ranks,): those of all ranks, by the places of their images in the whole batch."""
    rngs: SampleRngs
    """For all else, one an image."""
    noise: Image
    """(B, C, H, W)."""


class TrainingModule(LightningModule):
    """A network in training on noised images. A subclass builds `network` and says what a batch teaches it.

    What an image is trained with is drawn from (seed, batch, its place in the batch of all ranks together), so that it
    is the same for any number of ranks. Dropout alone is drawn from (seed, batch, rank).
    """

    network: nn.Module
    diffusion_settings: DiffusionSettings
    timestep_sampler: UniformTimesteps

    def __init__(self, optimizer: OptimizerSettings, max_nonfinite_batches: int, seed: int) -> None:
        """What does not depend on the network.

        Args:
            optimizer: AdamW and its rate.
            max_nonfinite_batches: a batch whose loss is not finite is skipped; after so many in a row the training ends.
            seed: of all that is drawn.

        Raises:
            UserError: `max_nonfinite_batches` is below 0.
        """
        super().__init__()
        require(max_nonfinite_batches >= 0, f"`max_nonfinite_batches` must be at least 0, got {max_nonfinite_batches}.")
        self.optimizer_settings, self.seed = optimizer, seed
        self._batch_ended: float | None = None
        self.max_nonfinite_batches, self.skipped, self.skipped_in_a_row = max_nonfinite_batches, 0, 0
        self._learned, self._validated = False, 0
        self._sums: dict[str, Tensor] = {}

    def _images(self, images: ImageUint8) -> Image:
        """In float32, or in float64 if the network is."""
        dtype = next(self.network.parameters()).dtype
        return to_float(images).to(torch.promote_types(dtype, torch.float32))

    def _drawn(self, x_0: Image) -> Drawn:
        """All for one training step, whose dropout begins anew."""
        rank, ranks, size = self.global_rank, self.trainer.world_size, len(x_0)
        number = self.trainer.fit_loop.total_batch_idx  # over all epochs, and a resumed run counts on
        seed_dropout(self.seed, number, rank)
        rngs = batch_rngs(self.seed, number, range(rank, size * ranks, ranks))
        everywhere, weights = self.timestep_sampler.sample(size * ranks, timestep_generator(self.seed, number))
        mine = {"timesteps": everywhere[rank::ranks], "weights": weights[rank::ranks]}
        return Drawn(**mine, everywhere=everywhere, rngs=rngs, noise=randn(rngs, x_0.shape[1:]))

    def _learns(self, values: Mapping[str, Tensor]) -> bool:
        """Whether the loss, the first of the values, is finite on every rank; the means of all are logged, or skipped.

        Raises:
            UserError: too many in a row were not.
        """
        means = self._of_ranks(torch.stack([value.detach() for value in values.values()]), "mean")
        finite = bool(torch.isfinite(means[0]))
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        require(
            self.skipped_in_a_row <= self.max_nonfinite_batches,
            f"`model.max_nonfinite_batches` allows {self.max_nonfinite_batches} batches in a row whose loss is not finite, and there are "
            "more. Lower model.optimizer.learning_rate, or set trainer.gradient_clip_val, and --resume.",
        )
        self.log("train/skipped", float(self.skipped))
        if finite:
            self._learned = True
            self.log_dict({f"train/{name}": mean for name, mean in zip(values, means, strict=True)})
            self.log("train/rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return finite

    def _nothing(self) -> Tensor:
        """A loss that teaches nothing, for DDP waits for every gradient."""
        return torch.stack([0 * p.sum() for p in self.network.parameters() if p.requires_grad]).sum()

    def _of_ranks(self, values: Tensor, kind: str) -> Tensor:
        """Mean or sum of what every rank has its own of."""
        if self.trainer.world_size == 1:
            return values
        reduced: Tensor = self.trainer.strategy.reduce(values.to(self.device), reduce_op=kind)
        return reduced

    # ---------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self._validated, self._sums = 0, {}

    def _shown(self, x_0: Image) -> tuple[Timestep, Image]:
        """Timesteps and noise that stay an image's own, in batches of any size and on any number of ranks."""
        places = range(self._validated, self._validated + len(x_0))
        ids = [place * self.trainer.world_size + self.global_rank for place in places]
        self._validated += len(x_0)
        return van_der_corput_timesteps(ids, self.diffusion_settings.num_timesteps), initial_noise(
            0, ids, x_0.shape[1:]
        )

    def _count(self, name: str, values: PerSample, timesteps: Timestep | None = None) -> None:
        """(B,) values, whose mean over all images becomes val/NAME; with timesteps also of each quarter of them."""
        total = self.diffusion_settings.num_timesteps
        quarter = (
            torch.zeros(len(values), dtype=torch.int64) if timesteps is None else timesteps * NUM_TIMESTEP_BINS // total
        )
        sums = self._sums.setdefault(
            name, torch.zeros(1 if timesteps is None else NUM_TIMESTEP_BINS, 2, dtype=torch.float64)
        )
        sums.index_add_(0, quarter.cpu(), torch.stack([torch.ones_like(values), values], dim=1).double().cpu())

    def on_validation_epoch_end(self) -> None:
        """Log the means of all ranks, and of the quarters (0 the cleanest) that an image fell into."""
        for name, sums in self._sums.items():
            of_all = self._of_ranks(sums, "sum").cpu()
            images, total = of_all.sum(dim=0).tolist()
            self.log(f"val/{name}", total / images)
            for q, (inside, part) in enumerate(of_all.tolist()):
                if inside and len(sums) > 1:
                    self.log(f"val/{name}_quarter_{q}", part / inside)
            if name == "loss" and self.trainer.state.fn != "fit":
                self.log("val/images", images)

    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation, of other images."""
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 (Lightning's own union)
        """AdamW; the rate as `OptimizerSettings.lr_multiplier` has it, step by step."""
        s = self.optimizer_settings
        optimizer = adamw((p for p in self.network.parameters() if p.requires_grad), s)
        max_steps = self.trainer.max_steps
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: s.lr_multiplier(step, max_steps))
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
        """What the timestep sampler has learned, and how many batches were skipped."""
        checkpoint["timestep_sampler"] = self.timestep_sampler.state_dict()
        checkpoint["skipped"], checkpoint["skipped_in_a_row"] = self.skipped, self.skipped_in_a_row

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with these."""
        self.timestep_sampler.load_state_dict(checkpoint.get("timestep_sampler", {}))
        self.skipped, self.skipped_in_a_row = checkpoint.get("skipped", 0), checkpoint.get("skipped_in_a_row", 0)
