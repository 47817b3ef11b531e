"""The variational bound on the likelihood, in bits per dimension.

Ho et al. 2020, eq. 5 and 13; Nichol & Dhariwal 2021, eq. 4 to 7.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sagl.diffusion.noise import SampleRngs
from sagl.diffusion.predictor import Condition, NoisePredictor, split_eps_and_variance
from sagl.diffusion.process import add_noise, cast_like, posterior_mean, x0_hat_from_eps
from sagl.diffusion.schedule import Schedule
from sagl.settings.diffusion import Variance
from sagl.shapes import Image, PerSample, Timestep


def vlb_term(
    x_0: Image, x_t: Image, eps: Image, log_variance: Tensor, schedule: Schedule, steps: Tensor, *, clip_x0: bool
) -> PerSample:
    """Compute one term of the bound: the KL of the reverse step or, at step 0, the decoder's likelihood."""
    alpha_bar, alpha_bar_prev = schedule.alpha_bar(steps), schedule.alpha_bar(steps - 1)
    x0_hat = x0_hat_from_eps(x_t, eps, alpha_bar, clip=clip_x0)
    mean = posterior_mean(x0_hat, x_t, alpha_bar, alpha_bar_prev)
    true_mean = posterior_mean(x_0, x_t, alpha_bar, alpha_bar_prev)
    true_log_variance = cast_like(schedule.log_posterior_variance(steps), x_0)
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    decoder_nll = -discretized_log_likelihood(x_0, mean, log_variance / 2)
    return torch.where(steps == 0, mean_flat(decoder_nll), mean_flat(kl)) / math.log(2)


@dataclass(frozen=True, kw_only=True)
class BitsPerDim:
    """The variational bound in bits per dimension."""

    total: PerSample
    """Sum of all terms, (B,)."""
    vlb_terms: Tensor
    """(B, S): one term per step, the noisiest step first."""
    prior: PerSample
    """KL of q(x_T | x_0) from the standard normal, (B,)."""


@torch.no_grad()
def bits_per_dim(
    predict: NoisePredictor,
    x_0: Image,
    schedule: Schedule,
    noise: Callable[[int], Image],
    condition: Condition | None = None,
    *,
    clip_x0: bool = True,
) -> BitsPerDim:
    """Compute the whole bound of images (B, C, H, W) in [-1, 1], with one network evaluation per step."""
    terms = []
    for step in reversed(range(schedule.num_steps)):
        x_t = add_noise(x_0, noise(step), schedule.alpha_bar(step))
        prediction = predict(x_t, step, condition or Condition())
        steps = torch.full((len(x_0),), step, device=x_0.device)
        terms.append(vlb_term(x_0, x_t, prediction.eps, prediction.log_variance, schedule, steps, clip_x0=clip_x0))
    vlb_terms, prior = torch.stack(terms, dim=1), prior_bits(x_0, schedule)
    return BitsPerDim(total=vlb_terms.sum(dim=1) + prior, vlb_terms=vlb_terms, prior=prior)


def sample_vlb_timesteps(rngs: SampleRngs, num_timesteps: int) -> tuple[Timestep, PerSample]:
    """Draw one timestep per sample for `estimated_bits_per_dim`: -> (B,) int64 and the weights 1 / p, (B,) float32.

    Half of the probability is uniform, half in proportion to 1 / (t + 1), because the terms are large at small t.
    """
    harmonic = 1 / torch.arange(1, num_timesteps + 1, dtype=torch.float64)
    p = harmonic / (2 * harmonic.sum()) + 0.5 / num_timesteps
    uniform = torch.tensor([rng.random() for rng in rngs], dtype=torch.float64)
    timesteps = torch.searchsorted(p.cumsum(0), uniform, right=True).clamp(max=num_timesteps - 1)
    return timesteps, (1 / p[timesteps]).float()


@torch.no_grad()
def estimated_bits_per_dim(
    model: Callable[[Image, Timestep], Tensor],
    x_0: Image,
    timesteps: Timestep,
    weights: PerSample,
    noise: Image,
    schedule: Schedule,
    *,
    variance: Variance,
) -> PerSample:
    """Estimate the whole bound from one term per sample, without bias; one network evaluation in total.

    Args:
        model: (x_t, timesteps) -> the network's channels.
        x_0: (B, C, H, W) in [-1, 1].
        timesteps: (B,) int64, drawn by `sample_vlb_timesteps`.
        weights: (B,), 1 / probability of each timestep.
        noise: (B, C, H, W), standard normal.
        schedule: the whole process.
        variance: variance of the reverse step.
    """
    x_t = add_noise(x_0, noise, schedule.alpha_bar(timesteps))
    out = model(x_t, timesteps).to(x_0.dtype)
    eps, log_variance = split_eps_and_variance(out, x_0.shape[1], schedule, timesteps, variance)
    term = vlb_term(x_0, x_t, eps, log_variance, schedule, timesteps, clip_x0=True)
    return weights.to(term) * term + prior_bits(x_0, schedule)


def prior_bits(x_0: Image, schedule: Schedule) -> PerSample:
    """Compute the KL of q(x_T | x_0) from the standard normal, in bits per dimension."""
    alpha_bar = schedule.alpha_bar(schedule.num_steps - 1)
    zero = torch.zeros((), dtype=x_0.dtype, device=x_0.device)
    kl = gaussian_kl(cast_like(alpha_bar.sqrt(), x_0) * x_0, cast_like((1 - alpha_bar).log(), x_0), zero, zero)
    return mean_flat(kl) / math.log(2)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Compute KL(N(mean) || N(other)) element by element, in nats."""
    log_ratio = log_variance - other_log_variance
    distance = (mean - other_mean) ** 2 * (-other_log_variance).exp()
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + distance)  # exp(log_ratio) - 1 would lose small terms


def discretized_log_likelihood(x: Image, mean: Image, log_scale: Tensor) -> Tensor:
    """Compute the log probability, in nats, of 8-bit pixels under a Gaussian; bins are 2/255 wide, the outer two open.

    The normal distribution function is ADM's tanh approximation (Page 1977), so that likelihoods agree with ADM's.
    """
    centered, inverse_scale = x - mean, (-log_scale).exp()
    cdf_below = _normal_cdf(inverse_scale * (centered - 1 / 255))
    cdf_above = _normal_cdf(inverse_scale * (centered + 1 / 255))
    inner = torch.where(x > 0.999, 1 - cdf_below, cdf_above - cdf_below)
    probability = torch.where(x < -0.999, cdf_above, inner)
    return probability.clamp(min=1e-12).log()


def mean_flat(x: Tensor) -> PerSample:
    """Average over all dimensions but the batch: (B, …) -> (B,)."""
    return x.flatten(1).mean(dim=1)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
