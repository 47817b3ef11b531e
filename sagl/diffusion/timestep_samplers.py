"""Samplers of training timesteps, with the weights that keep the mean loss unbiased."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sagl.shapes import PerSample, Timestep


class UniformTimesteps:
    """Sampler that draws every timestep with the same probability, and base class of samplers that adapt."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def sample(self, batch: int, generator: torch.Generator | None = None) -> tuple[Timestep, PerSample]:
        """Draw timesteps: -> (B,) int64 and their weights, (B,) float32."""
        return torch.randint(self.num_timesteps, (batch,), generator=generator), torch.ones(batch)

    def update(self, timesteps: Timestep, losses: PerSample) -> None:
        """Record the losses at these timesteps."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the recorded losses."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`; an empty one changes nothing."""


class LossSecondMomentTimesteps(UniformTimesteps):
    """Sampler in proportion to the root mean square of each timestep's last losses (Nichol & Dhariwal 2021, §3.3).

    Timesteps are uniform until every one of them has a full history. `losses`, (T, history) float64, holds the oldest
    loss first; `counts`, (T,) int64, the number of recorded losses, at most `history`.
    """

    def __init__(self, num_timesteps: int, history: int = 10, uniform_fraction: float = 0.001) -> None:
        super().__init__(num_timesteps)
        self.history, self.uniform_fraction = history, uniform_fraction
        self.losses = torch.zeros(num_timesteps, history, dtype=torch.float64)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """Return the probability of every timestep: -> (T,) float64, sum 1."""
        uniform = torch.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=torch.float64)
        if (self.counts < self.history).any():
            return uniform
        moment = (self.losses**2).mean(dim=1).sqrt()
        return (1 - self.uniform_fraction) * moment / moment.sum() + self.uniform_fraction * uniform

    def sample(self, batch: int, generator: torch.Generator | None = None) -> tuple[Timestep, PerSample]:
        """Draw timesteps with the weights 1 / (T p)."""
        p = self.probabilities()
        timesteps = torch.multinomial(p, batch, replacement=True, generator=generator)
        return timesteps, (1 / (self.num_timesteps * p[timesteps])).float()

    def update(self, timesteps: Timestep, losses: PerSample) -> None:
        """Append each loss to its timestep's history; a full history drops its oldest loss."""
        for t, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            if self.counts[t] == self.history:
                self.losses[t] = self.losses[t].roll(-1)
                self.losses[t, -1] = loss
            else:
                self.losses[t, self.counts[t]] = loss
                self.counts[t] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return the histories."""
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the histories."""
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)


def van_der_corput_timesteps(ids: Sequence[int], num_timesteps: int) -> Timestep:
    """Return a fixed timestep for each id; ids 0 … 2^k - 1 cover the process evenly: -> (B,) int64.

    The timestep is the id's binary digits in reverse, read as a fraction (van der Corput sequence).
    """
    return torch.tensor([int(f"{i % 2**32:032b}"[::-1], 2) * num_timesteps >> 32 for i in ids])
