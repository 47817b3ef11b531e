"""Base class of the LightningModules: random numbers, optimiser, skipped batches, validation means and logs."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed, nn
from torch.optim import AdamW

from sagl.diffusion.noise import SampleRngs, batch_rngs, initial_noise, randn, seed_dropout, timestep_generator
from sagl.diffusion.schedule import make_schedule
from sagl.diffusion.timestep_samplers import UniformTimesteps, van_der_corput_timesteps
from sagl.errors import require
from sagl.models.cpu_kernels import optimize_for_cpu
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.training import OptimizerSettings, TrainingSettings
from sagl.shapes import Image, ImageUint8, Labels, PerSample, Timestep
from sagl.utils.environment import peak_gigabytes
from sagl.utils.images import to_float
from sagl.utils.prefetch import pin, prefetch

Batch = tuple[ImageUint8, Labels]
Network = TypeVar("Network", bound=nn.Module)
NUM_TIMESTEP_BINS = 4
"""Number of equal ranges of timesteps for which validation losses are also reported."""
NUM_NOISE_THREADS = 4
"""Threads that draw the noise of the next batch while a GPU trains."""


def adamw(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> AdamW:
    """Build a fused AdamW."""
    s = settings
    optimizer = AdamW(parameters, lr=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay, fused=True)
    optimizer._step_supports_amp_scaling = False  # it could unscale gradients itself; Lightning clips what it unscaled
    return optimizer


def seeded_init(build: Callable[[], Network], seed: int) -> Network:
    """Build a network whose initial weights depend on the seed alone, with the fastest kernels of CPUs.

    The global generator keeps its state.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return optimize_for_cpu(build())


def gather_batch(values: Tensor, trainer: Trainer) -> Tensor:
    """Gather (B, …) values of every rank -> (B · world_size, …), by position in the global batch."""
    if trainer.world_size == 1:
        return values
    gathered: Tensor = trainer.strategy.all_gather(values)
    return gathered.transpose(0, 1).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class TrainingNoise:
    """Random quantities of one training step: those of this rank's images, and the timesteps of all ranks."""

    timesteps: Timestep
    """(B,): timesteps of this rank's images."""
    weights: PerSample
    """(B,): weights of the losses at these timesteps."""
    global_timesteps: Timestep
    """(B · world_size,): timesteps of all ranks, by position in the global batch."""
    rngs: SampleRngs
    """One random generator per image, for all other random choices."""
    noise: Image
    """(B, C, H, W): noise of this rank's images."""


class BatchNoise(NamedTuple):
    """Noise of this rank's images of a batch, (B, C, H, W), and their generators after it was drawn."""

    batch_index: int
    rngs: SampleRngs
    noise: Image


class TrainingModule(LightningModule):
    """Training of a network on noisy images. A subclass builds `network` and defines the loss of a batch.

    The random quantities of an image depend on (seed, batch index, position in the global batch), so they are the
    same for any number of ranks. Dropout masks depend on (seed, batch index, rank).
    """

    network: nn.Module
    timestep_sampler: UniformTimesteps

    def __init__(self, settings: TrainingSettings, diffusion: DiffusionSettings) -> None:
        """Store the settings as plain hyperparameters and build the noise schedule.

        Args:
            settings: those of the training, with the network's settings in place of a name.
            diffusion: the diffusion process.
        """
        super().__init__()
        self.save_hyperparameters({**asdict(settings), "diffusion": asdict(diffusion)})
        self.settings, self.diffusion_settings = settings, diffusion
        self.schedule = make_schedule(diffusion)
        self.num_skipped = self.num_skipped_since_step = 0
        self._step_has_gradient = False
        self._noise_ahead: Iterator[BatchNoise] = iter(())
        self._compiled_network: Callable[..., Any] | None = None
        self._batch_end_time: float | None = None
        self._num_validated = 0
        self._sums: dict[str, Tensor] = {}

    def on_train_start(self) -> None:
        """Compile the network if the settings ask for it; accumulated gradients would be overwritten by CUDA graphs."""
        if self.settings.compile:
            cuda_graphs = self.device.type == "cuda" and self.trainer.accumulate_grad_batches == 1
            compiled = torch.compile(self.network, dynamic=False, mode="reduce-overhead" if cuda_graphs else None)
            self._compiled_network = lambda *args, **kwargs: compiled(*args, **kwargs)  # not a submodule

    def _call_network(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (whatever the network takes and returns)
        """Evaluate the network, in training the compiled one if there is one."""
        if not self.training or self._compiled_network is None:
            return self.network(*args, **kwargs)
        torch.compiler.cudagraph_mark_step_begin()
        return self._compiled_network(*args, **kwargs)

    def _to_float(self, images: ImageUint8) -> Image:
        """Scale uint8 images to [-1, 1], in float32, or in float64 if the network is."""
        dtype = next(self.network.parameters()).dtype
        return to_float(images).to(torch.promote_types(dtype, torch.float32))

    def _sample_noise(self, x_0: Image) -> TrainingNoise:
        """Draw the random quantities of a training step and seed its dropout."""
        rank, world_size, seed = self.global_rank, self.trainer.world_size, self.settings.seed
        batch_index = self.trainer.fit_loop.total_batch_idx  # over all epochs, continued by a resumed run
        global_size = len(x_0) * world_size
        seed_dropout(seed, batch_index, rank)
        timesteps, weights = self.timestep_sampler.sample(global_size, timestep_generator(seed, batch_index))
        batch_noise = self._draw_noise(batch_index, x_0.shape)
        return TrainingNoise(
            timesteps=timesteps[rank::world_size],
            weights=weights[rank::world_size],
            global_timesteps=timesteps,
            rngs=batch_noise.rngs,
            noise=batch_noise.noise,
        )

    def _draw_noise(self, batch_index: int, shape: torch.Size) -> BatchNoise:
        """Return the noise of a batch, which was drawn during the batch before if that had the same shape."""
        batch_noise = next(self._noise_ahead, None)
        if batch_noise is None or (batch_noise.batch_index, batch_noise.noise.shape) != (batch_index, shape):
            self._noise_ahead = prefetch(self._draw_noise_from(batch_index, shape))
            batch_noise = next(self._noise_ahead)
        return batch_noise

    def _draw_noise_from(self, batch_index: int, shape: torch.Size) -> Iterator[BatchNoise]:
        """Draw the noise of one batch after the other."""
        rank, world_size = self.global_rank, self.trainer.world_size
        for index in count(batch_index):
            rngs = batch_rngs(self.settings.seed, index, range(rank, shape[0] * world_size, world_size))
            num_threads = NUM_NOISE_THREADS if self.device.type == "cuda" else 1  # a CPU's cores train the network
            yield BatchNoise(index, rngs, pin(randn(rngs, shape[1:], num_threads), self.device))

    def _log_if_finite(self, values: Mapping[str, Tensor]) -> bool:
        """Log the rank means of `values` if the loss, the first of them, is finite on all ranks; return whether it is.

        Raises:
            UserError: too many batches were skipped.
        """
        means = self._all_reduce(torch.stack([value.detach() for value in values.values()]), "mean")
        finite = bool(torch.isfinite(means[0]))
        if not finite:
            self._count_skipped_batch()
        self._step_has_gradient |= finite
        if self.logs_this_step:
            self.log("train/skipped_batches", float(self.num_skipped))
        if self.logs_this_step and finite:
            self.log_dict({f"train/{name}": mean for name, mean in zip(values, means, strict=True)})
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return finite

    def _count_skipped_batch(self) -> None:
        """Count a batch whose loss or gradient is not finite.

        Raises:
            UserError: there were too many since the last step of the optimiser.
        """
        self.num_skipped += 1
        self.num_skipped_since_step += 1
        require(
            self.num_skipped_since_step <= self.settings.max_nonfinite_batches,
            f"`model.max_nonfinite_batches` allows {self.settings.max_nonfinite_batches} batches with a loss or "
            f"gradient that is not finite between two steps of the optimiser, got {self.num_skipped_since_step}. Lower "
            "model.optimizer.learning_rate, or set trainer.gradient_clip_val, and resume.",
        )

    @property
    def logs_this_step(self) -> bool:
        """Return whether loggers receive the values of this step. Others are not logged: each would make a GPU wait."""
        return self.trainer._logger_connector.should_update_logs

    def _zero_loss(self) -> Tensor:
        """Return a loss with zero gradients; DDP waits for the gradient of every parameter."""
        return torch.stack([0 * p.sum() for p in self.network.parameters() if p.requires_grad]).sum()

    def _all_reduce(self, values: Tensor, op: str) -> Tensor:
        """Reduce a tensor over all ranks by `op`, "mean" or "sum"."""
        if self.trainer.world_size == 1:
            return values
        total = values.to(self.device, copy=True)
        distributed.all_reduce(total)  # Lightning's reduction would also wait for all ranks at a barrier
        return total / self.trainer.world_size if op == "mean" else total

    # ---------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self._num_validated, self._sums = 0, {}

    def _next_validation_ids(self, size: int) -> list[int]:
        """Return the indices of a batch's images among those of all ranks, which determine their random numbers."""
        first = self._num_validated
        self._num_validated += size
        return [index * self.trainer.world_size + self.global_rank for index in range(first, first + size)]

    def _validation_noise(self, ids: Sequence[int], shape: torch.Size) -> tuple[Timestep, Image]:
        """Return timesteps (B,) and noise (B, C, H, W) of images of a shape (C, H, W)."""
        return van_der_corput_timesteps(ids, self.diffusion_settings.num_timesteps), initial_noise(0, ids, shape)

    def _accumulate(self, name: str, values: PerSample, timesteps: Timestep | None = None) -> None:
        """Add (B,) values to the mean that is logged as val/NAME; with timesteps, also to the means by range."""
        num_bins = 1 if timesteps is None else NUM_TIMESTEP_BINS
        bins = torch.zeros(len(values), dtype=torch.int64)
        if timesteps is not None:
            bins = timesteps.cpu() * NUM_TIMESTEP_BINS // self.diffusion_settings.num_timesteps
        sums = self._sums.setdefault(name, torch.zeros(num_bins, 2, dtype=torch.float64))
        sums.index_add_(0, bins, torch.stack([torch.ones_like(values), values], dim=1).double().cpu())

    def on_validation_epoch_end(self) -> None:
        """Log the means over all ranks, and those of each range of timesteps (q0: the cleanest) that has images."""
        for name, sums in self._sums.items():
            bins = self._all_reduce(sums, "sum").cpu()
            num_images, total = bins.sum(dim=0).tolist()
            self.log(f"val/{name}", total / num_images)
            for q, (num_in_bin, bin_total) in enumerate(bins.tolist()):
                if num_in_bin and len(bins) > 1:
                    self.log(f"val/{name}_q{q}", bin_total / num_in_bin)
            if name == "loss" and self.trainer.state.fn != "fit":
                self.log("val/num_images", num_images)

    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    # -------------------------------------------------------------------------------------- optimiser and logs

    def configure_optimizers(self) -> Any:  # noqa: ANN401 (Lightning's own union)
        """Build AdamW and a schedule that follows `OptimizerSettings.lr_multiplier` step by step."""
        s, max_steps = self.settings.optimizer, self.trainer.max_steps
        optimizer = adamw((p for p in self.network.parameters() if p.requires_grad), s)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: s.lr_multiplier(step, max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:  # noqa: ANN401 (Lightning's own)
        """Log the throughput, data loading included, and the peak memory."""
        now = time.monotonic()
        if self._batch_end_time is not None and self.logs_this_step:
            num_images = len(batch[0]) * self.trainer.world_size
            self.log("train/images_per_second", num_images / (now - self._batch_end_time))
        self._batch_end_time = now
        if self.logs_this_step:
            self.log("train/peak_memory_gb", peak_gigabytes())

    def on_validation_end(self) -> None:
        """Exclude the time of validation from the throughput."""
        self._batch_end_time = None

    def on_before_optimizer_step(self, optimizer: Any) -> None:  # noqa: ANN401 (Lightning's own)
        """Log the gradient norm before clipping; drop gradients that are not finite, or of skipped batches only.

        Raises:
            UserError: too many batches were skipped.
        """
        has_gradient, self._step_has_gradient = self._step_has_gradient, False
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        is_finite = bool(norm.isfinite())
        if has_gradient and is_finite:
            self.num_skipped_since_step = 0
        else:
            optimizer.zero_grad()  # with gradients of 0, AdamW's moments would still move the weights
        if has_gradient and not is_finite and not self._scales_gradients:
            self._count_skipped_batch()
        if self.logs_this_step:
            self.log("train/grad_norm", norm)

    @property
    def _scales_gradients(self) -> bool:
        """True for 16-mixed, whose scale of the loss is lowered after a gradient that overflows."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    # --------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["timestep_sampler"] = self.timestep_sampler.state_dict()
        checkpoint["num_skipped"] = self.num_skipped
        checkpoint["num_skipped_since_step"] = self.num_skipped_since_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of the training, but not the settings of its optimiser, which may have changed."""
        s = self.settings.optimizer
        for optimizer, schedule in zip(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], strict=True):
            learning_rate = s.learning_rate * s.lr_multiplier(schedule["last_epoch"], self.trainer.max_steps)
            for group in optimizer["param_groups"]:
                group |= {"initial_lr": s.learning_rate, "betas": s.betas, "weight_decay": s.weight_decay}
                group["lr"] = learning_rate
            schedule["base_lrs"] = [s.learning_rate for _ in schedule["base_lrs"]]
        self.timestep_sampler.load_state_dict(checkpoint.get("timestep_sampler", {}))
        self.num_skipped = checkpoint.get("num_skipped", 0)
        self.num_skipped_since_step = checkpoint.get("num_skipped_since_step", 0)
