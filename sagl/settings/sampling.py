"""Settings of a sampling run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sagl.errors import UserError, require, require_finite
from sagl.settings.diffusion import require_choice

MOST = 10_000_000
"""Images of one run."""
MAX_BATCH_SIZE = 65_536
"""Images of one micro-batch."""
MAX_PROCESSES = 256
"""On one machine."""
Sampler = Literal["ddpm", "ddim"]
WeightPrecision = Literal["32-true", "bf16-true", "16-true"]
Precision = Literal["auto", WeightPrecision]
Accelerator = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How one chain goes from noise to image."""

    sampler: Sampler = "ddpm"
    """ddpm: ancestral sampling; ddim: deterministic at eta 0."""
    respacing: str = "250"
    """Steps: "250" evenly spaced, "ddim25" at one whole stride, "10,15,20" by thirds of the process."""
    eta: float = 0.0
    """DDIM's share of the ancestral noise; only for sampler ddim."""
    clip_x0: bool = True
    """Clip the sampler's estimate of the clean image to [-1, 1]."""

    def __post_init__(self) -> None:
        """Refuse what has no chain."""
        require_finite(self)
        require_choice("sampler", self.sampler, ("ddpm", "ddim"))
        require(0 <= self.eta <= 1, f"`eta` must be in [0, 1], got {self.eta}.")
        require(
            self.sampler == "ddim" or self.eta == 0,
            f"`eta` is for sampler ddim, got eta {self.eta} with {self.sampler}. Add --sampler ddim.",
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Which samples a run makes."""

    num_samples: int = 16
    """Images to make; their ids are first_id, first_id + 1, …"""
    first_id: int = 0
    """Id of the first image; an image depends on seed and id alone."""
    batch_size: int | None = None
    """Images made together, a micro-batch; the last one is computed at full size and cut. null: what suits the size."""
    seed: int = 0
    """Of noise and random labels."""
    labels: str = "random"
    """random, balanced (0, 1, 2, … in turn), null (no label), or classes in turn: "3" or "0,7,9"."""

    def __post_init__(self) -> None:
        """Refuse empty runs and labels that are no numbers."""
        require(self.num_samples >= 1, f"`num_samples` must be at least 1, got {self.num_samples}.")
        require(self.num_samples <= MOST, f"`num_samples` must be at most {MOST:,}, got {self.num_samples}.")
        require(self.effective_batch_size >= 1, f"`batch_size` must be at least 1, got {self.batch_size}.")
        require(
            self.effective_batch_size <= MAX_BATCH_SIZE,
            f"`batch_size` must be at most {MAX_BATCH_SIZE}, got {self.batch_size}.",
        )
        for name in ("seed", "first_id"):
            value = getattr(self, name)
            require(0 <= value < 2**32, f"`{name}` must be in 0 … 2³² - 1, got {value}.")
        last = self.first_id + self.num_samples - 1
        require(last < 2**32, f"`first_id` must leave room for {self.num_samples} ids below 2³², got {self.first_id}.")
        if self.labels not in ("random", "balanced", "null"):
            _ = self.label_list

    @property
    def effective_batch_size(self) -> int:
        """batch_size, or where it is left open all images, up to 64."""
        return min(self.num_samples, 64) if self.batch_size is None else self.batch_size

    @property
    def label_list(self) -> list[int]:
        """The classes of a list.

        Raises:
            UserError: `labels` is no list of whole numbers.
        """
        parts = self.labels.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise UserError(f"`labels` must be random, balanced, null or classes like 0,7,9; got {self.labels!r}.")
        return [int(part) for part in parts]


def micro_batches(run: RunSettings) -> Iterator[list[int]]:
    """Sample ids in groups of exactly the batch size, which start at multiples of it; the last may go over the end."""
    size = run.effective_batch_size
    for start in range(run.first_id - run.first_id % size, run.first_id + run.num_samples, size):
        yield list(range(start, start + size))


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """Where, and with which numbers, the network computes."""

    accelerator: Accelerator = "auto"
    """auto: a GPU where there is one."""
    precision: Precision = "auto"
    """Of the network's weights; the process itself is always float32. auto: 16 bits where they are fast."""
    devices: str = "auto"
    """Processes a node, each with a GPU of its own or its share of the cores. auto: one a GPU, or one on CPUs."""
    num_nodes: int = 1
    """Machines that share the run, under torchrun or SLURM."""
    compile: bool = False
    """Have torch.compile make kernels for the network first: for GPUs and long runs, see docs/speed.md."""

    def __post_init__(self) -> None:
        """Refuse unknown names."""
        require_choice("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        require_choice("trainer.precision", self.precision, ("auto", "32-true", "bf16-true", "16-true"))
        count = int(self.devices) if self.devices.isascii() and self.devices.isdecimal() else 0
        require(
            self.devices in ("auto", "-1") or 1 <= count <= MAX_PROCESSES,
            f"`trainer.devices` must be auto or a number of processes, 1 … {MAX_PROCESSES}, got {self.devices!r}. "
            "Which GPUs they are is chosen by CUDA_VISIBLE_DEVICES.",
        )
        require(self.num_nodes >= 1, f"`trainer.num_nodes` must be at least 1, got {self.num_nodes}.")
