"""The noise schedule: beta_t and its cumulative products, in float64 (eq. 1, 2)."""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from sagl.diffusion.respacing import respaced_timesteps
from sagl.settings.diffusion import DiffusionSettings
from sagl.shapes import AlphaBar, Timestep

MIN_LOG_SNR = -10.0
"""Limit of even spacing by log signal-to-noise ratio. ADM's linear schedule ends there; the cosine schedule goes on to
-20 within its last few timesteps, and would spend a third of the steps on them."""


def linear_betas(num_timesteps: int) -> Tensor:
    """Ho et al. 2020: 1e-4 to 0.02 at 1000 timesteps, scaled for other lengths: -> (T,) float64."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17: alpha_bar is a squared cosine, beta at most 0.999: -> (T,) float64."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    times = [t / num_timesteps for t in range(num_timesteps + 1)]
    betas = [min(1 - alpha_bar(end) / alpha_bar(start), 0.999) for start, end in pairwise(times)]
    return torch.tensor(betas, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The sampler's steps, 0 the cleanest, each at a timestep of the original process.

    Methods take one step and return a scalar, or a batch of steps and return (B, 1, 1, 1), always in float64. Step -1
    is the clean image.
    """

    timesteps: Tensor
    """(S,) int64: original timestep of every step, on which the network is conditioned."""
    alphas_cumprod: Tensor
    """(S,) float64."""

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return len(self.timesteps)

    def alpha_bar(self, step: int | Tensor) -> AlphaBar:
        """Return the cumulative product of 1 - beta; 1 at step -1."""
        return self._gather("_padded", step, shift=1)

    def log_beta(self, step: int | Tensor) -> AlphaBar:
        """Return log beta, the upper end of a learned variance."""
        return self._gather("_log_betas", step)

    def log_posterior_variance(self, step: int | Tensor) -> AlphaBar:
        """Return the log variance of eq. 4, the lower end of a learned variance; step 0, -inf, takes step 1's value."""
        return self._gather("_log_posterior", step)

    def log_fixed_large_variance(self, step: int | Tensor) -> AlphaBar:
        """Return the fixed large log variance: log beta, with the posterior's at step 0 as in ADM."""
        return self._gather("_log_fixed_large", step)

    def timestep(self, step: int, batch: int, device: torch.device) -> Timestep:
        """Return the original timestep of a step: -> (batch,) int64, made on `device` without a copy."""
        return torch.zeros(batch, dtype=torch.int64, device=device) + self.timesteps[step]

    @cached_property
    def betas(self) -> Tensor:
        """(S,) float64: 1 - alpha_bar_t / alpha_bar_{t-1}."""
        return 1 - self._padded[1:] / self._padded[:-1]

    @cached_property
    def _log_betas(self) -> Tensor:
        return self.betas.log()

    @cached_property
    def _log_fixed_large(self) -> Tensor:
        return torch.cat([self._log_posterior[:1], self._log_betas[1:]])

    @cached_property
    def _padded(self) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod])

    @cached_property
    def _log_posterior(self) -> Tensor:
        variance = self.betas * (1 - self._padded[:-1]) / (1 - self._padded[1:])
        return torch.cat([variance[1:2] if self.num_steps > 1 else self.betas, variance[1:]]).log()

    @cached_property
    def _copies(self) -> dict[tuple[str, torch.device], Tensor]:
        """Tables by name and device, each copied to a device once."""
        return {}

    def _gather(self, name: str, step: int | Tensor, shift: int = 0) -> Tensor:
        table: Tensor = getattr(self, name)
        if isinstance(step, int):
            return table[step + shift]
        if (name, step.device) not in self._copies:
            self._copies[name, step.device] = table.to(step.device)
        return self._copies[name, step.device][step + shift][:, None, None, None]


def make_schedule(settings: DiffusionSettings, respacing: str | None = None) -> Schedule:
    """Return the schedule of the whole process, or of a respacing (Nichol & Dhariwal 2021, section 4).

    Raises:
        UserError: `respacing` does not fit the process.
    """
    betas = {"linear": linear_betas, "cosine": cosine_betas}[settings.noise_schedule](settings.num_timesteps)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)

    def log_snr() -> list[float]:
        values: list[float] = (alphas_cumprod / (1 - alphas_cumprod)).log().clamp(min=MIN_LOG_SNR).tolist()
        return values

    spec = respacing or str(settings.num_timesteps)
    timesteps = torch.tensor(respaced_timesteps(spec, settings.num_timesteps, log_snr))
    return Schedule(timesteps=timesteps, alphas_cumprod=alphas_cumprod[timesteps])
