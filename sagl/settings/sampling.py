"""Settings of a sampling run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sagl.errors import UserError, require, require_choices, require_finite, require_range, whole_number

MAX_SAMPLES, MAX_BATCH_SIZE, MAX_PROCESSES = 10_000_000, 65_536, 256
SAMPLERS = {
    "ddpm": "sagl.samplers.ddpm:ddpm",
    "ddim": "sagl.samplers.ddim:ddim",
    "dpm++2m": "sagl.samplers.dpm_solver:dpm_solver_pp_2m",
    "heun": "sagl.samplers.heun:heun",
    "unipc": "sagl.samplers.unipc:unipc",
}
"""Samplers by name, as "module:function"; imported when they are used, so that `--help` needs no PyTorch."""
if TYPE_CHECKING:
    Sampler = str
else:
    Sampler = Literal[tuple(SAMPLERS)]
WeightPrecision = Literal["32-true", "bf16-true", "16-true"]
Precision = Literal["auto", WeightPrecision]
Accelerator = Literal["auto", "cpu", "gpu"]
ProgressKind = Literal["auto", "bar", "lines", "off"]
"""auto: a bar on a terminal, lines elsewhere."""


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Sampler and its steps."""

    sampler: Sampler = "ddpm"
    """ddpm: ancestral sampling; ddim: deterministic at eta 0; dpm++2m, heun, unipc: second order, for few steps."""
    respacing: str = "250"
    """Sampling steps: "250" evenly spaced, "ddim25" with one integer stride, "10,15,20" by thirds of the process,
    "logsnr20" evenly spaced in the log signal-to-noise ratio."""
    eta: float = 0.0
    """Fraction of the ancestral noise that DDIM adds; only for sampler ddim."""
    clip_x0: bool = True
    """Clip x0_hat to [-1, 1] in every sampler step."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_choices(self)
        require(0 <= self.eta <= 1, f"`eta` must be in [0, 1], got {self.eta}.")
        require(
            self.sampler == "ddim" or self.eta == 0,
            f"`eta` must be 0 unless `sampler` is ddim, got {self.eta} with {self.sampler}.",
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Samples of a run: number, ids, seed and labels."""

    num_samples: int = 16
    """Number of images; their ids are first_id, first_id + 1, …"""
    first_id: int = 0
    """Id of the first image; an image depends on seed and id alone."""
    batch_size: int | None = None
    """Images per batch; the last batch is computed at full size too. null: chosen by image size and memory."""
    seed: int = 0
    """Random seed of noise and random labels."""
    labels: str = "random"
    """Class labels: random, balanced (0, 1, 2, … in turn), null (no label), or classes in turn such as "0,7,9"."""

    def __post_init__(self) -> None:
        require_range("num_samples", self.num_samples, 1, MAX_SAMPLES)
        if self.batch_size is not None:
            require_range("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)
        require_range("seed", self.seed, 0, 2**32 - 1)
        require_range("first_id", self.first_id, 0, 2**32 - self.num_samples)
        if self.labels not in ("random", "balanced", "null"):
            _ = self.label_list

    @property
    def effective_batch_size(self) -> int:
        """Return `batch_size`, or if it is None the number of images, up to 64."""
        return min(self.num_samples, 64) if self.batch_size is None else self.batch_size

    @property
    def label_list(self) -> list[int]:
        """Return the classes of a list such as "0,7,9".

        Raises:
            UserError: `labels` is not a list of whole numbers.
        """
        labels = [whole_number(part) for part in self.labels.split(",")]
        numbers = [label for label in labels if label is not None]
        if len(numbers) < len(labels):
            raise UserError(f"`labels` must be random, balanced, null or classes like 0,7,9; got {self.labels!r:.60}.")
        return numbers


def id_batches(samples: RunSettings) -> Iterator[list[int]]:
    """Yield batches of consecutive sample ids that cover the run, each of full size.

    They start at multiples of the batch size, so the first and the last may contain ids outside of the run.
    """
    size = samples.effective_batch_size
    for start in range(samples.first_id - samples.first_id % size, samples.first_id + samples.num_samples, size):
        yield list(range(start, start + size))


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """Device, precision and processes."""

    accelerator: Accelerator = "auto"
    """Device: cpu, gpu, or auto for a GPU if there is one."""
    precision: Precision = "auto"
    """Precision of the network's weights; the rest is always float32. auto: 16 bits where they are fast."""
    devices: str = "auto"
    """Processes per machine, each with its own GPU or part of the cores. auto: one per GPU, or one on CPUs."""
    num_nodes: int = 1
    """Machines of the run, under torchrun or SLURM."""
    compile: bool = False
    """Compile the network with torch.compile first: for GPUs and long runs, see docs/speed.md."""

    def __post_init__(self) -> None:
        require_choices(self, "trainer.")
        require(
            self.devices in ("auto", "-1") or 1 <= (whole_number(self.devices) or 0) <= MAX_PROCESSES,
            f"`trainer.devices` must be auto or a number of processes, 1 … {MAX_PROCESSES}, got {self.devices!r:.60}. "
            "CUDA_VISIBLE_DEVICES chooses the GPUs.",
        )
        require(self.num_nodes >= 1, f"`trainer.num_nodes` must be at least 1, got {self.num_nodes}.")
