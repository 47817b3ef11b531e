"""Sampling pipeline: network, schedule, sampler and guidance as one function from sample ids to images.

The command line, previews and analyses all make their images here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name

import torch
from torch import Tensor

from sagl.diffusion.noise import SampleKeys, StepNoise, initial_noise, random_labels, step_noise
from sagl.diffusion.predictor import Condition, NoisePredictor, Prediction, Trajectory, make_predictor
from sagl.diffusion.process import x0_hat_from_eps
from sagl.diffusion.schedule import Schedule, make_schedule
from sagl.errors import UserError, require
from sagl.guidance.base import Guidance, GuidanceContext, NoisyClassifier, with_guidance
from sagl.guidance.build import build_guidances
from sagl.guidance.masks import LoadClassAttention, load_class_attention
from sagl.models.adm import UNet
from sagl.models.checkpoints import DTYPES, AnyNetwork, NetworkWeights, build_classifier, build_network, cast_weights
from sagl.models.flops import flops_per_evaluation
from sagl.models.loading import load
from sagl.sampling.guidance_files import check_network_name
from sagl.sampling.heads import load_head
from sagl.settings.compatibility import check_compatible, check_labels, check_second_network
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import GuidanceSettings
from sagl.settings.sampling import SAMPLERS, RunSettings, SamplerSettings
from sagl.shapes import AttentionSite, Image, Labels, Mask
from sagl.utils.prefetch import pin, prefetch, to_device


@dataclass(frozen=True, kw_only=True)
class SamplingPipeline:
    """A network with its schedule, sampler and guidance; `build_pipeline` builds it."""

    network: UNet
    schedule: Schedule
    diffusion: DiffusionSettings
    sampler_settings: SamplerSettings
    guidances: Mapping[str, Guidance] = field(default_factory=dict)
    checkpoint: Path | None = None
    """Weight file of the network, beside which direction heads may lie."""

    def sample_progressive(
        self, seed: int, ids: Sequence[int], labels: Labels | None, attention_sites: Sequence[AttentionSite] = ()
    ) -> Trajectory:
        """Sample a batch step by step; the noise of each sample depends on seed and id alone.

        The predictions hold the attention received at `attention_sites`.

        Raises:
            UserError: as `check_labels`.
        """
        self.check_labels(are_null=labels is None)
        s, device = self.sampler_settings, next(self.network.parameters()).device
        x_T, noise = initial_noise(seed, ids, self.image_shape).to(device), self._step_noise(seed, ids, device)
        condition = Condition(
            labels=None if labels is None else labels.to(device),
            attention_sites=tuple(attention_sites),
            samples=SampleKeys(seed, ids),
        )
        options = {"eta": s.eta} if s.eta else {}  # only DDIM has it
        return self.sampler(self.predictor, x_T, condition, self.schedule, noise, clip_x0=s.clip_x0, **options)

    def sample(self, seed: int, ids: Sequence[int], labels: Labels | None) -> tuple[Image, Tensor | None]:
        """Sample a batch: -> the images and the mask frequency, as `run_to_end` returns them."""
        return run_to_end(self.sample_progressive(seed, ids, labels))

    def check_labels(self, *, are_null: bool) -> None:
        """Check that the weaker networks of guidances get labels if they need them.

        Raises:
            UserError: there are none.
        """
        for name, guidance in self.guidances.items():
            require(
                not (are_null and guidance.needs_labels),
                f"`{name}.checkpoint` must have a null label or no classes for `labels` null, got a network that needs "
                "a class for every image.",
            )

    def _step_noise(self, seed: int, ids: Sequence[int], device: torch.device) -> StepNoise:
        """Return the noise of the steps, each drawn while the step before it is computed.

        Samplers go from the noisiest step to the cleanest. After a step out of this order, drawing ahead starts again.
        """
        draw = step_noise(seed, ids, self.image_shape, torch.device("cpu"))

        def draw_ahead(first: int) -> Iterator[tuple[int, Image]]:
            return prefetch((step, pin(draw(step), device)) for step in range(first, 0, -1))

        ahead = draw_ahead(self.schedule.num_steps - 1)

        def noise(step: int) -> Image:
            nonlocal ahead
            drawn = next(ahead, None)
            if drawn is None or drawn[0] != step:
                ahead = draw_ahead(step)
                drawn = next(ahead)
            return to_device(drawn[1], device)

        return noise

    @property
    def predictor(self) -> NoisePredictor:
        """The network on the schedule, with guidance."""
        return with_guidance(make_predictor(self.network, self.schedule, self.diffusion.variance), self.guidances)

    @property
    def unguided(self) -> "SamplingPipeline":
        """The same pipeline without guidance."""
        return replace(self, guidances={})

    @property
    def nfe(self) -> float:
        """Network evaluations per sample, of the network itself and of weaker ones.

        A guidance that may end early (`stop_below`) counts in full, an evaluation of a part of the network
        (`reuse_before`) by its share of the operations.
        """
        base_nfe, extra_nfe = self._count_evaluations()
        return base_nfe + sum(extra_nfe.values())

    def _count_evaluations(self) -> tuple[float, dict[str, float]]:
        """Return the evaluations of base predictions and those of each guidance, by its name.

        They are counted by running the sampler on one pixel, without the network.
        """
        base_nfe, extra_nfe = 0.0, dict.fromkeys(self.guidances, 0.0)

        def predict(x_t: Image, step: int, _: Condition) -> Prediction:
            nonlocal base_nfe
            base_nfe += 1
            for name, guidance in self.guidances.items():
                if guidance.is_active(step) and guidance.evaluates_term(step):
                    extra_nfe[name] += guidance.extra_nfe
            return Prediction(eps=x_t, log_variance=torch.zeros(()))

        pixel = torch.zeros(1, 1, 1, 1)
        for _ in self.sampler(predict, pixel, Condition(), self.schedule, lambda step: pixel):
            pass
        return base_nfe, extra_nfe

    def cost(self, nfe: float) -> dict[str, float]:
        """Return the cost of a sample with `nfe` network evaluations for run.json, without classifiers and heads.

        An evaluation of a weaker network counts as the operations of that network.
        """
        flops = flops_per_evaluation(self.network.settings)
        weak = {name: s for name, g in self.guidances.items() if (s := g.weak_network_settings) is not None}
        extra_nfe = self._extra_nfe(nfe) if weak else {}
        excess = sum(extra_nfe[name] * (flops_per_evaluation(settings) - flops) for name, settings in weak.items())
        return {"nfe": nfe, "flops": nfe * flops + excess}

    def _extra_nfe(self, nfe: float) -> dict[str, float]:
        """Return the evaluations of each guidance, by its name, in a sample with `nfe` network evaluations.

        A sample has fewer than `self.nfe` because guidance ended early. If several methods may end, each is taken to
        have left out the same share of its evaluations.
        """
        base_nfe, extra_nfe = self._count_evaluations()
        may_end = [name for name, guidance in self.guidances.items() if guidance.may_end]
        most = sum(extra_nfe[name] for name in may_end)
        share = 1 - (base_nfe + sum(extra_nfe.values()) - nfe) / most if most else 1.0
        return extra_nfe | {name: share * extra_nfe[name] for name in may_end}

    @property
    def sampler(self) -> Callable[..., Trajectory]:
        """The function that runs a chain, such as `sagl.samplers.ddim.ddim`."""
        sampler: Callable[..., Trajectory] = resolve_name(SAMPLERS[self.sampler_settings.sampler])
        return sampler

    @property
    def image_shape(self) -> tuple[int, int, int]:
        settings = self.network.settings
        return settings.in_channels, settings.image_size, settings.image_size


def build_pipeline(
    network: UNet,
    diffusion: DiffusionSettings,
    sampler_settings: SamplerSettings,
    guidances: Mapping[str, GuidanceSettings] | None = None,
    load_classifier: Callable[[str], NoisyClassifier] | None = None,
    checkpoint: Path | None = None,
    load_network: Callable[[str, str], UNet] | None = None,
    load_attention: LoadClassAttention = load_class_attention,
) -> SamplingPipeline:
    """Check settings against the network and build the pipeline.

    Args:
        network: the UNet, on its device and in its precision.
        diffusion: process that the network was trained for.
        sampler_settings: sampler and respacing.
        guidances: settings of guidance methods by their names in `GUIDANCES`; those of scale 0 are left out.
        load_classifier: loads the classifier of classifier guidance by name or file; by default `sagl.load` does.
        checkpoint: weight file of the network, for `direction_head` auto.
        load_network: loads the weaker network of autoguidance; by default `load_weak_network` does.
        load_attention: loads the class attention of SAG's mask dino.

    Raises:
        UserError: settings that do not fit the network, or a classifier that cannot be loaded or does not fit.
    """
    guidances = guidances or {}
    check_compatible(network.settings, diffusion, guidances)
    context = GuidanceContext(
        network=network,
        network_settings=network.settings,
        diffusion=diffusion,
        schedule=make_schedule(diffusion, sampler_settings.respacing),
        load_network=load_network or (lambda name, weights: load_weak_network(name, weights, network, diffusion)),
        load_classifier=load_classifier or (lambda name: load_noisy_classifier(name, network, diffusion)),
        load_attention=load_attention,
        load_head=lambda settings, has_mask: load_head(settings, has_mask, network, diffusion, checkpoint),
        share_of_evaluation=lambda start: (
            flops_per_evaluation(network.settings, start) / flops_per_evaluation(network.settings)
        ),
    )
    return SamplingPipeline(
        network=network,
        schedule=context.schedule,
        diffusion=diffusion,
        sampler_settings=sampler_settings,
        guidances=build_guidances(guidances, context),
        checkpoint=checkpoint,
    )


def load_noisy_classifier(name: str, network: UNet, diffusion: DiffusionSettings) -> NoisyClassifier:
    return _load_second_network("classifier.checkpoint", name, "ema", build_classifier, network, diffusion)


def load_weak_network(name: str, weights: str, network: UNet, diffusion: DiffusionSettings) -> UNet:
    """Load the weaker network of autoguidance, in the precision and on the device of the network that it guides.

    Args:
        name: its name or file.
        weights: weights of a training checkpoint, as of `sagl.load`.
        network: the network that it guides.
        diffusion: process of that network.

    Raises:
        UserError: it cannot be loaded, or does not fit the network.
    """
    return _load_second_network("autoguidance.checkpoint", name, weights, build_network, network, diffusion)


def _load_second_network(
    parameter: str,
    name: str,
    weights: str,
    build: Callable[[NetworkWeights], AnyNetwork],
    network: UNet,
    diffusion: DiffusionSettings,
) -> AnyNetwork:
    """Load a network that guides the first one, in the first one's precision and on its device.

    Raises:
        UserError: it cannot be loaded, or does not fit the first one.
    """
    check_network_name(parameter, name, network.settings, diffusion)
    try:
        checkpoint = load(name, weights)
        other = build(checkpoint)
    except UserError as error:
        raise UserError(f"`{parameter}` {name} cannot be used: {error}") from error
    check_second_network(parameter, other.settings, checkpoint.diffusion, network.settings, diffusion)
    weight = next(network.parameters())
    (precision,) = (precision for precision, dtype in DTYPES.items() if dtype == weight.dtype)
    return cast_weights(other, precision, weight.device)


def run_to_end(trajectory: Trajectory) -> tuple[Image, Tensor | None]:
    """Run a sampler to its end.

    Returns:
        The images, (B, C, H, W), and the fraction of a sample's guided steps in which each pixel was masked,
        (B, 1, H, W); None if no step had a mask.
    """
    num_masked: Tensor | None = None
    num_guided = torch.zeros(())
    x = torch.empty(0)
    for _, x, prediction in trajectory:  # noqa: B007 (the last x is the result)
        for mask, guided in _masks(prediction):
            num_masked = mask.float() if num_masked is None else num_masked + mask.float()
            num_guided = num_guided + (1.0 if guided is None else guided.float())
    return x, None if num_masked is None else num_masked / num_guided


def make_labels(samples: RunSettings, ids: Sequence[int], network: UNet) -> Labels | None:
    """Return the class of each sample, (B,) int64; None for an unconditional network or the null label.

    Raises:
        UserError: the network does not have the class, or no null label.
    """
    check_labels(samples, network.settings)
    num_classes = network.settings.num_classes
    if num_classes is None or samples.labels == "null":
        return None
    if samples.labels == "random":
        return torch.tensor(random_labels(samples.seed, ids, num_classes))
    classes = list(range(num_classes)) if samples.labels == "balanced" else samples.label_list
    return torch.tensor([classes[i % len(classes)] for i in ids])


def x0_predictions(
    pipeline: SamplingPipeline, seed: int, ids: Sequence[int], labels: Labels | None
) -> Iterator[tuple[int, Image, Mask | None]]:
    """Yield the clipped x0_hat of every step and its mask, the noisiest step first.

    Yields:
        (step, (B, C, H, W), (B, 1, H, W) bool or None if the step had no mask).
    """
    x = initial_noise(seed, ids, pipeline.image_shape)
    for step, x_next, prediction in pipeline.sample_progressive(seed, ids, labels):
        x0_hat = x0_hat_from_eps(x.to(x_next), prediction.eps, pipeline.schedule.alpha_bar(step), clip=True)
        yield step, x0_hat, next((mask for mask, _ in _masks(prediction)), None)
        x = x_next


def _masks(prediction: Prediction) -> Iterator[tuple[Mask, Tensor | None]]:
    """Yield the masks of a step, each with the samples that its term guides; None: all."""
    return ((term.extras["mask"], term.guided) for term in prediction.terms.values() if "mask" in term.extras)
