"""Settings of training: optimiser, averages, checkpoints."""

from dataclasses import dataclass

from sagl.settings.errors import require


@dataclass(frozen=True, kw_only=True)
class SavingSettings:
    """What is averaged, and how often it is saved."""

    average_decay: float = 0.9999
    """Of the average of the weights, a step."""
    save_every_steps: int = 1000
    """Steps between two checkpoints."""
    save_every_minutes: float = 5.0
    """Minutes between two checkpoints, whichever comes first."""

    def __post_init__(self) -> None:
        """Refuse what would never save, or never learn."""
        require(0 <= self.average_decay < 1, f"`average_decay` must be in [0, 1), got {self.average_decay}.")
        for name in ("save_every_steps", "save_every_minutes"):
            require(getattr(self, name) > 0, f"`{name}` must be above 0, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its learning rate over time."""

    learning_rate: float = 1e-4
    """The rate after warm-up."""
    weight_decay: float = 0.0
    """ADM uses none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of the two running means."""
    warmup_steps: int = 0
    """Steps in which the rate rises linearly from 0."""
    decay_steps: int = 0
    """Last steps before trainer.max_steps, in which the rate falls linearly to 0; 0: constant to the end."""

    def __post_init__(self) -> None:
        """Refuse rates and lengths that make no sense."""
        require(self.learning_rate > 0, f"`learning_rate` must be above 0, got {self.learning_rate}.")
        require(self.weight_decay >= 0, f"`weight_decay` must be at least 0, got {self.weight_decay}.")
        for name in ("warmup_steps", "decay_steps"):
            require(getattr(self, name) >= 0, f"`{name}` must be at least 0, got {getattr(self, name)}.")

    def rate_factor(self, step: int, max_steps: int) -> float:
        """The rate at a step as a share of `learning_rate`; `max_steps` -1 is no end."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        left = (max_steps - step) / self.decay_steps if self.decay_steps and max_steps > 0 else 1.0
        return warm * max(0.0, min(1.0, left))
