"""What training minimises and what a likelihood is: L_simple, L_vlb, the hybrid, bits/dim; timestep samplers.

Ho et al. 2020, eq. 5 and 14; Nichol & Dhariwal 2021, eq. 4 to 7 and 16, section 3.3.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sagl.diffusion.predictor import Condition, NoisePredictor, split_eps_and_variance
from sagl.diffusion.process import add_noise, maybe_clip, posterior_mean, x0_hat_from_eps
from sagl.diffusion.schedule import Schedule
from sagl.settings.diffusion import Loss, Variance
from sagl.shapes import Image, PerSample


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Per sample, (B,)."""

    total: PerSample
    """What is minimised."""
    mse: PerSample
    """L_simple: mean squared error of eps."""
    vb: PerSample
    """The bound's term at the timestep, scaled by T/1000 (by T in kind "vlb"); 0 where it is not trained."""


Eps = Callable[[Image, Tensor], Tensor]
"""(x_t, timesteps (B,)) -> the network's channels (B, C or 2C, H, W)."""


def training_losses(
    predict: Eps,
    x_0: Image,
    timesteps: Tensor,
    noise: Image,
    schedule: Schedule,
    *,
    kind: Loss,
    variance: Variance,
    max_snr_weight: float = 1.0,
    target: Image | None = None,
) -> Losses:
    """Losses of one batch, each sample at its own timestep of the whole process.

    Args:
        predict: the network at (x_t, timesteps).
        x_0: (B, C, H, W) in [-1, 1].
        timesteps: (B,) int64.
        noise: (B, C, H, W), standard normal.
        schedule: the whole process, not a respaced one.
        kind: hybrid trains the mean by L_simple and the variance alone by the bound.
        variance: the reverse step's.
        max_snr_weight: L_simple counts 1 / alpha_bar times, at most so often. 1: everywhere alike, as in ADM.
        target: (B, C, H, W), the eps that L_simple asks for; None: the noise.
    """
    alpha_bar = schedule.alpha_bar(timesteps)
    x_t = add_noise(x_0, noise, alpha_bar)
    out = predict(x_t, timesteps).to(x_0.dtype)
    eps, log_variance = split_eps_and_variance(out, x_0.shape[1], schedule, timesteps, variance)
    mse = mean_flat(((noise if target is None else target) - eps) ** 2)
    weighted = mse * (1 / alpha_bar).clamp(max=max_snr_weight).flatten().to(mse)
    if kind == "simple" or (kind == "hybrid" and variance != "learned_range"):  # a fixed variance has nothing to learn
        return Losses(total=weighted, mse=mse, vb=torch.zeros_like(mse))
    bound_eps = eps.detach() if kind == "hybrid" else eps
    scale = schedule.num_steps / (1000 if kind == "hybrid" else 1)
    vb = scale * vlb_term(x_0, x_t, bound_eps, log_variance, schedule, timesteps, clip_x0=False)
    return Losses(total=vb if kind == "vlb" else weighted + vb, mse=mse, vb=vb)


def mask_vlb(losses: Losses, where: Tensor) -> Losses:
    """The losses, of which the bound is left out for the samples of `where`, (B,) bool."""
    vb = torch.where(where, 0.0, losses.vb)
    return Losses(total=losses.total - losses.vb + vb, mse=losses.mse, vb=vb)


def vlb_term(
    x_0: Image, x_t: Image, eps: Image, log_variance: Tensor, schedule: Schedule, steps: Tensor, *, clip_x0: bool
) -> PerSample:
    """One term of the variational bound, in bits a dimension: KL, or at step 0 the decoder's likelihood."""
    alpha_bar, before = schedule.alpha_bar(steps), schedule.alpha_bar(steps - 1)
    x0_hat = maybe_clip(x0_hat_from_eps(x_t, eps, alpha_bar), clip_x0)
    mean = posterior_mean(x0_hat, x_t, alpha_bar, before)
    true_mean = posterior_mean(x_0, x_t, alpha_bar, before)
    true_log_variance = schedule.log_posterior_variance(steps).to(x_0)
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    decoder = -discretized_log_likelihood(x_0, mean, log_variance / 2)
    return torch.where(steps == 0, mean_flat(decoder), mean_flat(kl)) / math.log(2)


@dataclass(frozen=True, kw_only=True)
class BitsPerDim:
    """The bound on the likelihood, in bits a dimension."""

    total: PerSample
    """Sum of all terms."""
    vb: Tensor
    """(B, S): a term a step, in the order visited: the noisiest first."""
    prior: PerSample
    """KL of x_T from the standard normal."""


@torch.no_grad()
def bits_per_dim(
    denoise: NoisePredictor,
    x_0: Image,
    schedule: Schedule,
    noise: Callable[[int], Image],
    condition: Condition | None = None,
    *,
    clip_x0: bool = True,
) -> BitsPerDim:
    """The whole variational bound of images under a chain: (B, C, H, W) in [-1, 1] -> bits a dimension."""
    terms = []
    for step in reversed(range(schedule.num_steps)):
        x_t = add_noise(x_0, noise(step), schedule.alpha_bar(step))
        p = denoise(x_t, step, condition or Condition())
        steps = torch.full((len(x_0),), step, device=x_0.device)
        terms.append(vlb_term(x_0, x_t, p.eps, p.log_variance, schedule, steps, clip_x0=clip_x0))
    vb = torch.stack(terms, dim=1)
    prior = prior_bits(x_0, schedule)
    return BitsPerDim(total=vb.sum(dim=1) + prior, vb=vb, prior=prior)


def sample_vlb_timesteps(batch: int, num_timesteps: int, generator: torch.Generator) -> tuple[Tensor, PerSample]:
    """One timestep a sample, to estimate the whole bound from: (B,) int64 and the weights 1 / p, (B,) float32.

    Half of the draws are even, half in proportion to 1 / (t + 1): the terms are large where t is small.
    """
    harmonic = 1 / torch.arange(1, num_timesteps + 1, dtype=torch.float64)
    p = harmonic / (2 * harmonic.sum()) + 0.5 / num_timesteps
    timesteps = torch.multinomial(p, batch, replacement=True, generator=generator)
    return timesteps, (1 / p[timesteps]).float()


@torch.no_grad()
def estimated_bits_per_dim(
    predict: Eps,
    x_0: Image,
    timesteps: Tensor,
    weights: PerSample,
    noise: Image,
    schedule: Schedule,
    *,
    variance: Variance,
) -> PerSample:
    """The whole bound from one of its terms a sample, which `sample_vlb_timesteps` chose: its mean is `bits_per_dim`'s.

    Takes one pass of the network in place of one a timestep; a single sample's number says little.

    Args:
        predict: the network at (x_t, timesteps).
        x_0: (B, C, H, W) in [-1, 1].
        timesteps: (B,) int64.
        weights: (B,), 1 / probability of each.
        noise: (B, C, H, W), standard normal.
        schedule: the whole process.
        variance: the reverse step's.
    """
    x_t = add_noise(x_0, noise, schedule.alpha_bar(timesteps))
    out = predict(x_t, timesteps).to(x_0.dtype)
    eps, log_variance = split_eps_and_variance(out, x_0.shape[1], schedule, timesteps, variance)
    term = vlb_term(x_0, x_t, eps, log_variance, schedule, timesteps, clip_x0=True)
    return weights.to(term) * term + prior_bits(x_0, schedule)


def prior_bits(x_0: Image, schedule: Schedule) -> PerSample:
    """KL of q(x_T | x_0) from the standard normal, in bits a dimension."""
    alpha_bar = schedule.alpha_bar(schedule.num_steps - 1)
    zero = torch.zeros((), dtype=x_0.dtype, device=x_0.device)
    kl = gaussian_kl(alpha_bar.sqrt().to(x_0) * x_0, (1 - alpha_bar).log().to(x_0), zero, zero)
    return mean_flat(kl) / math.log(2)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean) || N(other)), element by element, in nats."""
    ratio = log_variance - other_log_variance
    distance = (mean - other_mean) ** 2 * (-other_log_variance).exp()
    return 0.5 * (torch.expm1(ratio) - ratio + distance)  # expm1: small terms would drown in exp(ratio) - 1


def discretized_log_likelihood(x: Image, mean: Image, log_scale: Tensor) -> Tensor:
    """Log probability, in nats, of 8-bit pixels under a Gaussian: each bin is 2/255 wide, the outer two are open.

    The normal distribution function is ADM's tanh approximation (Page 1977), so that likelihoods agree.
    """
    centred, inverse = x - mean, (-log_scale).exp()
    below = _normal_cdf(inverse * (centred - 1 / 255))
    above = _normal_cdf(inverse * (centred + 1 / 255))
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def mean_flat(x: Tensor) -> PerSample:
    """Mean over all but the batch: (B, …) -> (B,)."""
    return x.flatten(1).mean(dim=1)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# ------------------------------------------------------------------------------------------ timestep samplers


def van_der_corput_timesteps(ids: Sequence[int], num_timesteps: int) -> Tensor:
    """A timestep for each id, always the same, of which those of ids 0 … 2^k - 1 are evenly spread: -> (B,) int64.

    The binary digits of an id in reverse, as van der Corput has it.
    """
    return torch.tensor([int(f"{i % 2**32:032b}"[::-1], 2) * num_timesteps >> 32 for i in ids])


class TimestepSampler(Protocol):
    """Draws the timesteps to train, with the weights that keep the mean loss unbiased."""

    def sample(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, PerSample]:
        """-> timesteps (B,) int64, weights (B,) float32."""

    def update(self, timesteps: Tensor, losses: PerSample) -> None:
        """Learn from the losses seen at these timesteps."""

    def state(self) -> dict[str, Tensor]:
        """All that was learned."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""


@dataclass(frozen=True, kw_only=True)
class UniformTimesteps:
    """Every timestep alike."""

    num_timesteps: int

    def sample(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, PerSample]:
        """-> timesteps (B,) int64, weights 1."""
        return torch.randint(self.num_timesteps, (batch,), generator=generator), torch.ones(batch)

    def update(self, timesteps: Tensor, losses: PerSample) -> None:
        """Nothing to learn."""

    def state(self) -> dict[str, Tensor]:
        """Nothing learned."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to go on from."""


@dataclass(frozen=True, kw_only=True)
class LossSecondMomentTimesteps:
    """In proportion to the root mean square of each timestep's last losses (Nichol & Dhariwal 2021, section 3.3).

    Until every timestep has a full history, all are alike.
    """

    num_timesteps: int
    history: int = 10
    uniform_share: float = 0.001
    losses: Tensor = field(init=False)
    """(T, history) float64, oldest first."""
    counts: Tensor = field(init=False)
    """(T,) int64: losses seen, at most `history`."""

    def __post_init__(self) -> None:
        """An empty history."""
        object.__setattr__(self, "losses", torch.zeros(self.num_timesteps, self.history, dtype=torch.float64))
        object.__setattr__(self, "counts", torch.zeros(self.num_timesteps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """(T,) float64, sum 1."""
        uniform = torch.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=torch.float64)
        if (self.counts < self.history).any():
            return uniform
        moment = (self.losses**2).mean(dim=1).sqrt()
        return (1 - self.uniform_share) * moment / moment.sum() + self.uniform_share * uniform

    def sample(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, PerSample]:
        """-> timesteps (B,) int64, weights 1 / (T p) float32."""
        p = self.probabilities()
        timesteps = torch.multinomial(p, batch, replacement=True, generator=generator)
        return timesteps, (1 / (self.num_timesteps * p[timesteps])).float()

    def state(self) -> dict[str, Tensor]:
        """The histories."""
        return {"losses": self.losses, "counts": self.counts}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the histories of a `state`; from empty ones where it has none."""
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)

    def update(self, timesteps: Tensor, losses: PerSample) -> None:
        """Push each loss onto its timestep's history, dropping the oldest of a full one."""
        for t, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            if self.counts[t] == self.history:
                self.losses[t] = torch.cat([self.losses[t, 1:], self.losses.new_tensor([loss])])
            else:
                self.losses[t, self.counts[t]] = loss
                self.counts[t] += 1
