"""The seam: what one evaluation is told, what it brings back, and the network as a function of (x_t, step)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sagl.diffusion.process import learned_log_variance
from sagl.diffusion.schedule import Schedule
from sagl.errors import require
from sagl.settings.diffusion import Variance
from sagl.shapes import AttentionSite, Image, Labels, Timestep, TokenMap


@dataclass(frozen=True, kw_only=True)
class Condition:
    """All that one evaluation is told besides x_t and step, and what it is to bring back."""

    labels: Labels | None = None
    """(B,); None is the null label."""
    attention_sites: tuple[AttentionSite, ...] = ()
    """Where to bring back the attention received."""
    degraded: bool = False
    """Whether x_t was degraded; told to networks that `has_degraded_embedding` says can be told."""


@dataclass(frozen=True, kw_only=True)
class GuidanceTerm:
    """What one guidance adds at one step, already scaled."""

    eps: Image | float = 0.0
    """scale · (eps - eps of a weaker prediction): eq. 11, 15, 17."""
    score: Image | float = 0.0
    """scale · grad log p(y | x_t): eq. 9. The sampler adds it, after its clip."""
    nfe: float = 0.0
    """Network evaluations a sample that it cost."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """To show: SAG's mask."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one evaluation brings back; guided, the sum of the plain one and the terms."""

    eps: Image
    """(B, C, H, W) predicted noise."""
    log_variance: Tensor
    """() or (B, C, H, W): log variance of the reverse step."""
    score: Image | float = 0.0
    """Sum of the terms' scores."""
    nfe: float = 1.0
    """Network evaluations a sample."""
    attention: Mapping[AttentionSite, TokenMap] = field(default_factory=dict)
    """Attention received, where the condition asked."""
    terms: Mapping[str, GuidanceTerm] = field(default_factory=dict)
    """What each guidance added, by name."""


NoisePredictor = Callable[[Image, int, Condition], Prediction]
"""(x_t, step, condition) -> prediction; a guided denoiser is one again."""


class NetworkOutput(Protocol):
    """What a network brings back; see `sagl.models.adm.UNetOutput`."""

    @property
    def out(self) -> Tensor:
        """(B, C, H, W) eps; (B, 2C, H, W) with a learned variance behind it."""

    @property
    def attention(self) -> Mapping[AttentionSite, TokenMap]:
        """Attention received, at the sites asked for."""


class EpsNetwork(Protocol):
    """Any network that predicts eps from (x_t, timestep, labels) and can tell what its tokens attend to."""

    def __call__(
        self,
        x: Image,
        timesteps: Timestep,
        labels: Labels | None = None,
        *,
        attention_sites: Sequence[AttentionSite] = (),
    ) -> NetworkOutput:
        """One pass."""


def has_degraded_embedding(network: EpsNetwork) -> bool:
    """Whether a network can be told that x_t was degraded: one with `settings.degraded_embedding`."""
    return bool(getattr(getattr(network, "settings", None), "degraded_embedding", False))


def make_predictor(network: EpsNetwork, schedule: Schedule, variance: Variance) -> NoisePredictor:
    """A network on a schedule as a `NoisePredictor`. The arithmetic outside the network is the caller's dtype."""

    def denoise(x_t: Image, step: int, condition: Condition) -> Prediction:
        """One pass, split into eps and log variance."""
        timesteps = schedule.timestep(step, len(x_t), x_t.device)
        told: dict[str, Any] = {"attention_sites": condition.attention_sites}
        if condition.degraded and has_degraded_embedding(network):
            told["degraded"] = torch.ones(len(x_t), dtype=torch.bool, device=x_t.device)
        output = network(x_t, timesteps, condition.labels, **told)
        eps, log_variance = split_eps_and_variance(output.out.to(x_t.dtype), x_t.shape[1], schedule, step, variance)
        # a copy: a view would keep the variance's channels alive through the passes of a guidance
        return Prediction(eps=eps.clone(), log_variance=log_variance, attention=output.attention)

    return denoise


def split_eps_and_variance(
    out: Tensor, channels: int, schedule: Schedule, step: int | Tensor, variance: Variance
) -> tuple[Image, Tensor]:
    """A network's channels as eps and log variance: (B, C or 2C, H, W) -> (B, C, H, W), () … (B, C, H, W).

    With a fixed variance, channels behind eps are left unread.

    Raises:
        UserError: the variance is to be the network's, and it has no channels for it.
    """
    eps, behind = out[:, :channels], out[:, channels:]
    if variance == "learned_range":
        require(behind.shape == eps.shape, "`variance` learned_range needs a network with learn_sigma: true.")
        return eps, learned_log_variance(behind, schedule.log_posterior_variance(step), schedule.log_beta(step))
    fixed = (
        schedule.log_posterior_variance(step) if variance == "fixed_small" else schedule.log_fixed_large_variance(step)
    )
    return eps, fixed.to(out)
