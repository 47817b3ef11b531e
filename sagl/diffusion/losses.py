"""Training losses: L_simple, L_vlb and their hybrid (Ho et al. 2020, eq. 14; Nichol & Dhariwal 2021, eq. 16)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sagl.diffusion.likelihood import mean_flat, vlb_term
from sagl.diffusion.predictor import split_eps_and_variance
from sagl.diffusion.process import add_noise
from sagl.diffusion.schedule import Schedule
from sagl.settings.diffusion import Loss, Variance
from sagl.shapes import Image, PerSample, Timestep

ModelFn = Callable[[Image, Timestep], Tensor]
"""(x_t, timesteps (B,)) -> the network's channels (B, C or 2C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses per sample, (B,)."""

    total: PerSample
    """The loss that is minimised."""
    mse: PerSample
    """L_simple: mean squared error of eps."""
    vlb: PerSample
    """The term of the variational bound at the timestep, times T/1000 (times T in kind "vlb"); 0 if not trained."""


def training_losses(
    model: ModelFn,
    x_0: Image,
    timesteps: Timestep,
    noise: Image,
    schedule: Schedule,
    *,
    kind: Loss,
    variance: Variance,
    max_v_weight: float = 1.0,
    target: Image | None = None,
) -> Losses:
    """Compute the losses of one batch, each sample at its own timestep.

    Args:
        model: the network.
        x_0: (B, C, H, W) in [-1, 1].
        timesteps: (B,) int64.
        noise: (B, C, H, W), standard normal.
        schedule: the whole process, not a respaced one.
        kind: hybrid trains the mean by L_simple and the variance by the bound alone.
        variance: variance of the reverse step.
        max_v_weight: upper limit of the weight 1 / alpha_bar on L_simple; 1 weights all timesteps alike, as in ADM.
        target: (B, C, H, W), the eps that L_simple compares with; None: the noise.
    """
    alpha_bar = schedule.alpha_bar(timesteps)
    x_t = add_noise(x_0, noise, alpha_bar)
    out = model(x_t, timesteps).to(x_0.dtype)
    eps, log_variance = split_eps_and_variance(out, x_0.shape[1], schedule, timesteps, variance)
    mse = mean_flat(((noise if target is None else target) - eps) ** 2)
    weighted = mse * (1 / alpha_bar).clamp(max=max_v_weight).flatten().to(mse)
    if kind == "simple" or (kind == "hybrid" and variance != "learned_range"):  # a fixed variance has nothing to learn
        return Losses(total=weighted, mse=mse, vlb=torch.zeros_like(mse))
    vlb_eps = eps.detach() if kind == "hybrid" else eps
    scale = schedule.num_steps / (1000 if kind == "hybrid" else 1)
    vlb = scale * vlb_term(x_0, x_t, vlb_eps, log_variance, schedule, timesteps, clip_x0=False)
    return Losses(total=vlb if kind == "vlb" else weighted + vlb, mse=mse, vlb=vlb)


def mask_vlb(losses: Losses, mask: Tensor) -> Losses:
    """Leave the bound out of the losses of masked samples, (B,) bool."""
    vlb = torch.where(mask, 0.0, losses.vlb)
    return Losses(total=losses.total - losses.vlb + vlb, mse=losses.mse, vlb=vlb)
