"""Settings of the diffusion process, its training loss and its samplers."""

from dataclasses import dataclass
from typing import Literal

from sagl.errors import require

NoiseSchedule = Literal["linear", "cosine"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Loss = Literal["hybrid", "simple", "vlb"]
TimestepSampler = Literal["uniform", "loss_second_moment"]


def require_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuse `value` unless it is among `allowed`.

    Raises:
        UserError: names the argument, what is allowed and what came.
    """
    require(value in allowed, f"`{name}` must be one of {', '.join(map(str, allowed))}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """The process that a network was trained for."""

    noise_schedule: NoiseSchedule = "linear"
    """beta over time: linear (ADM) or cosine (Nichol & Dhariwal 2021)."""
    num_timesteps: int = 1000
    """Length of the original process; a network is conditioned on 0 … num_timesteps - 1."""
    variance: Variance = "learned_range"
    """Of a reverse step: between posterior and beta as the network says, or fixed at either end."""

    def __post_init__(self) -> None:
        """Refuse what has no process."""
        require_choice("noise_schedule", self.noise_schedule, ("linear", "cosine"))
        require_choice("variance", self.variance, ("learned_range", "fixed_small", "fixed_large"))
        least = 21 if self.noise_schedule == "linear" else 1  # linear betas reach 20 / num_timesteps
        require(
            self.num_timesteps >= least,
            f"`num_timesteps` must be at least {least} for a {self.noise_schedule} schedule, got {self.num_timesteps}.",
        )


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What training minimises."""

    kind: Loss = "hybrid"
    """hybrid: L_simple plus the bound for the variance alone (ADM); simple: L_simple; vlb: the bound."""
    max_snr_weight: float = 1.0
    """L_simple counts 1 / alpha_bar times (the error of v; Salimans & Ho 2022), at most so often; 1: alike, as in ADM.

    A short training learns x0_hat at high noise with a limit near 100: an error of eps is 1 / alpha_bar times as
    large there (squared), and L_simple hardly sees it."""
    timestep_sampler: TimestepSampler = "uniform"
    """Which timesteps are trained: all alike, or in proportion to their loss's root mean square."""

    def __post_init__(self) -> None:
        """Refuse unknown names."""
        require_choice("kind", self.kind, ("hybrid", "simple", "vlb"))
        require(self.max_snr_weight >= 1, f"`max_snr_weight` must be at least 1, got {self.max_snr_weight}.")
        require_choice("timestep_sampler", self.timestep_sampler, ("uniform", "loss_second_moment"))
