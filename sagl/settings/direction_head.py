"""Settings of the training of direction heads (`sagl.models.direction_head`)."""

from dataclasses import dataclass, field

from sagl.errors import require, require_finite, require_range
from sagl.settings.sampling import Sampler
from sagl.settings.training import OptimizerSettings, TrainingSettings


@dataclass(frozen=True, kw_only=True)
class DirectionHeadOptions:
    """A direction head and the chains of its training."""

    method: str = "sag"
    """Guidance method whose direction is learned; its settings are those of the group of this name."""
    width: int = 32
    """Channels of the hidden convolutions at full resolution."""
    depth: int = 1
    """Number of hidden convolutions at full resolution, without the output convolution."""
    coarse_width: int = 48
    """Channels of the hidden convolution at each resolution below that of the image."""
    samplers: tuple[Sampler, ...] = ("ddim", "ddpm")
    """Samplers of the chains, drawn for each group of chains."""
    num_steps: tuple[int, int] = (10, 50)
    """Smallest and largest number of steps of a chain, drawn for each group of chains."""
    scales: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest guidance scale of a chain, drawn uniformly."""
    null_fraction: float = 0.5
    """Probability that a chain has no label, for networks with labels and a null label (the weaker one too)."""
    num_groups: int = 8
    """Groups of chains of a round, over all processes; a group shares sampler and steps."""
    group_size: int = 8
    """Chains of a group, which the network evaluates together."""
    batches_per_round: int = 250
    """Batches that are drawn from the steps of a round before the next chains are sampled."""
    batch_size: int = 64
    """Steps of chains per batch and process."""
    num_validation_groups: int = 8
    """Groups of chains that are held out for validation."""

    def __post_init__(self) -> None:
        require_finite(self, "direction_head.")
        for name in ("num_groups", "group_size", "batches_per_round", "batch_size", "num_validation_groups"):
            require_range(f"direction_head.{name}", getattr(self, name), 1, 1_000_000)
        for name in ("num_steps", "scales"):
            low, high = getattr(self, name)
            require(low <= high, f"`direction_head.{name}` must be two numbers low <= high, got {low}, {high}.")
        require(self.num_steps[0] >= 1, f"`direction_head.num_steps` must be at least 1, got {self.num_steps[0]}.")
        require(len(self.samplers) > 0, "`direction_head.samplers` must have at least one sampler, got none.")
        require_range("direction_head.null_fraction", self.null_fraction, 0, 1)


@dataclass(frozen=True, kw_only=True)
class HeadTrainingSettings(TrainingSettings):
    """Training of a direction head: guidance of a frozen network distilled into a small decoder of its feature maps."""

    direction_head: DirectionHeadOptions
    """The head and the chains that it learns from."""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(learning_rate=1e-3))
    """AdamW and its learning-rate schedule."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("diffusion", "freeze", "use_checkpoint"):
            value = getattr(self, name)
            require(value in (None, ()), f"`model.{name}` must be left out for a direction head, got {value}.")
