"""Settings of the diffusion process, its training loss and its samplers."""

from dataclasses import dataclass
from typing import Literal

from sagl.errors import require, require_choices, require_range

NoiseSchedule = Literal["linear", "cosine"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Loss = Literal["hybrid", "simple", "vlb"]
TimestepSampler = Literal["uniform", "loss_second_moment"]
MAX_TIMESTEPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """Diffusion process that a network was trained for."""

    noise_schedule: NoiseSchedule = "linear"
    """Noise schedule: linear (ADM) or cosine (Nichol & Dhariwal 2021)."""
    num_timesteps: int = 1000
    """Length of the process; the network is conditioned on timesteps 0 … num_timesteps - 1."""
    variance: Variance = "learned_range"
    """Variance of a reverse step: predicted between posterior variance and beta, or fixed at either."""

    def __post_init__(self) -> None:
        require_choices(self)
        smallest = 21 if self.noise_schedule == "linear" else 1  # linear betas reach 20 / num_timesteps
        require_range("num_timesteps", self.num_timesteps, smallest, MAX_TIMESTEPS)


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Training loss."""

    kind: Loss = "hybrid"
    """Loss: hybrid (ADM: L_simple, and the bound for the variance alone), simple (L_simple) or vlb (the bound)."""
    max_v_weight: float = 1.0
    """Upper limit of the weight 1 / alpha_bar on L_simple (error of v; Salimans & Ho 2022); 1: no weights, as in ADM.

    A limit near 100 helps short trainings: at high noise, the squared error of x0_hat is 1 / alpha_bar times that of
    eps, to which L_simple is hardly sensitive."""
    timestep_sampler: TimestepSampler = "uniform"
    """Timesteps of training: uniform, or in proportion to the root mean square of their losses."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.max_v_weight >= 1, f"`max_v_weight` must be at least 1, got {self.max_v_weight}.")
