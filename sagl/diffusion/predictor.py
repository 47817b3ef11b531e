"""Noise predictors: one network evaluation as a function of (x_t, step, condition)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sagl.diffusion.noise import SampleKeys
from sagl.diffusion.process import cast_like, interpolate_log_variance
from sagl.diffusion.schedule import Schedule
from sagl.errors import require
from sagl.settings.diffusion import Variance
from sagl.shapes import AttentionEdit, AttentionSite, Image, Labels, NetworkOutput, Timestep, TokenMap


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Inputs of one evaluation besides x_t and step, and the attention that it should return."""

    labels: Labels | None = None
    """(B,); None is the null label."""
    attention_sites: tuple[AttentionSite, ...] = ()
    """Sites whose attention is returned."""
    attention_edits: tuple[tuple[str, AttentionEdit], ...] = ()
    """Names of blocks with functions that replace their attention; see `AttentionEdit`."""
    timestep_noise: Tensor | None = None
    """(B, E): noise that is added to the timestep embedding, in units of its standard deviation."""
    degraded: bool = False
    """True if x_t was degraded; passed to networks with an embedding for it, see `has_degraded_embedding`."""
    features: bool = False
    """True if the last feature map is returned."""
    block_inputs: tuple[str, ...] = ()
    """Output blocks of the network whose input is returned."""
    start: tuple[str, Tensor] | None = None
    """Output block at which the evaluation starts, with its input from another evaluation."""
    samples: SampleKeys | None = None
    """Seed and ids of the samples, for guidance methods that draw random numbers."""


@dataclass(frozen=True, kw_only=True)
class GuidanceTerm:
    """Term that one guidance method adds at one step, already scaled."""

    eps: Image | float = 0.0
    """scale · (eps - eps of a weaker prediction): eq. 11, 15, 17."""
    score: Image | float = 0.0
    """scale · grad log p(y | x_t): eq. 9. The sampler adds it after its clip."""
    nfe: float = 0.0
    """Network evaluations per sample that the term took."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors for display, such as SAG's mask."""
    guided: Tensor | None = None
    """(B, 1, 1, 1) bool: samples that the term guides at this step; None: all."""
    ended: Tensor | None = None
    """(B, 1, 1, 1) bool: samples that it guides at no later step; None: not known of any."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Output of one evaluation; with guidance, the sum of the base prediction and all terms."""

    eps: Image
    """(B, C, H, W) predicted noise."""
    log_variance: Tensor
    """() or (B, C, H, W): log variance of the reverse step."""
    score: Image | float = 0.0
    """Sum of the terms' scores."""
    nfe: float = 1.0
    """Network evaluations per sample."""
    attention: Mapping[AttentionSite, TokenMap] = field(default_factory=dict)
    """Attention received at the condition's sites."""
    features: Tensor | None = None
    """(B, F, H, W) input of the network's last convolution, if the condition requests it."""
    block_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Inputs of the output blocks that the condition requests."""
    terms: Mapping[str, GuidanceTerm] = field(default_factory=dict)
    """Terms of the guidance methods by name."""


NoisePredictor = Callable[[Image, int, Condition], Prediction]
"""(x_t, step, condition) -> prediction. A guided predictor has the same signature."""
Trajectory = Iterator[tuple[int, Image, Prediction]]
"""Iterator of a sampler: (step, x after the step, the step's prediction), the noisiest step first."""


class EpsNetwork(Protocol):
    """Any network that predicts eps from (x_t, timestep, labels) and can return attention.

    It gets a condition's `attention_edits`, `timestep_noise`, `features`, `block_inputs` and `start` too, if there are
    any.
    """

    def __call__(
        self,
        x: Image,
        timesteps: Timestep,
        labels: Labels | None = None,
        *,
        attention_sites: Sequence[AttentionSite] = (),
    ) -> NetworkOutput:
        """Evaluate the network."""


def has_degraded_embedding(network: EpsNetwork) -> bool:
    """Return whether the network has an input for "x_t was degraded": `settings.degraded_embedding`."""
    return bool(getattr(getattr(network, "settings", None), "degraded_embedding", False))


def make_predictor(network: EpsNetwork, schedule: Schedule, variance: Variance) -> NoisePredictor:
    """Return a network on a schedule as a `NoisePredictor`. Arithmetic outside the network has the dtype of x_t."""

    def predict(x_t: Image, step: int, condition: Condition) -> Prediction:
        """Evaluate the network once, and pass it only those parts of the condition that are set."""
        timesteps = schedule.timestep(step, len(x_t), x_t.device)
        kwargs: dict[str, Any] = {"attention_sites": condition.attention_sites}
        if condition.attention_edits:
            kwargs["attention_edits"] = condition.attention_edits
        if condition.timestep_noise is not None:
            kwargs["timestep_noise"] = condition.timestep_noise
        if condition.degraded and has_degraded_embedding(network):
            kwargs["degraded"] = torch.ones(len(x_t), dtype=torch.bool, device=x_t.device)
        if condition.features:
            kwargs["features"] = True
        if condition.block_inputs:
            kwargs["block_inputs"] = condition.block_inputs
        if condition.start is not None:
            kwargs["start"] = condition.start
        output = network(x_t, timesteps, condition.labels, **kwargs)
        eps, log_variance = split_eps_and_variance(output.out.to(x_t.dtype), x_t.shape[1], schedule, step, variance)
        # clone: a view would keep the variance channels alive during further evaluations of a guidance
        features = output.features if condition.features else None
        return Prediction(
            eps=eps.clone(),
            log_variance=log_variance,
            attention=output.attention,
            features=features,
            block_inputs=output.block_inputs if condition.block_inputs else {},
        )

    return predict


def split_eps_and_variance(
    out: Tensor, channels: int, schedule: Schedule, step: int | Tensor, variance: Variance
) -> tuple[Image, Tensor]:
    """Split a network's channels into eps and log variance: (B, C or 2C, H, W) -> (B, C, H, W), () … (B, C, H, W).

    A fixed variance ignores further channels.

    Raises:
        UserError: the variance is learned_range, and the network has no channels for it.
    """
    eps, variance_channels = out[:, :channels], out[:, channels:]
    if variance == "learned_range":
        require(
            variance_channels.shape == eps.shape, "`variance` learned_range needs a network with learn_sigma: true."
        )
        low, high = schedule.log_posterior_variance(step), schedule.log_beta(step)
        return eps, interpolate_log_variance(variance_channels, low, high)
    if variance == "fixed_small":
        return eps, cast_like(schedule.log_posterior_variance(step), out)
    return eps, cast_like(schedule.log_fixed_large_variance(step), out)
