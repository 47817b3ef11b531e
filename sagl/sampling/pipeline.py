"""Settings and sample ids -> chain of images: the one room that sees guidance and samplers both.

The command line, previews and measurements all make their images here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sagl.diffusion.noise import initial_noise, random_labels, step_noise
from sagl.diffusion.predictor import Condition, NoisePredictor, Prediction, make_predictor
from sagl.diffusion.process import clip, x0_hat_from_eps
from sagl.diffusion.schedule import Schedule, make_schedule
from sagl.errors import UserError
from sagl.guidance.base import Guidance, guided
from sagl.guidance.classifier import NoisyClassifier, classifier_guidance
from sagl.guidance.classifier_free import classifier_free_guidance
from sagl.guidance.sag import sag
from sagl.models.adm import UNet
from sagl.samplers.ddim import ddim
from sagl.samplers.ddpm import ddpm
from sagl.settings.compatibility import check_compatible, check_labels
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import ClassifierFreeGuidance, ClassifierGuidance, SelfAttentionGuidance
from sagl.settings.sampling import ChainSettings, RunSettings
from sagl.shapes import Image, Labels, Mask

Chain = Iterator[tuple[int, Image, Prediction]]
"""(step, x after it, the prediction behind it), the noisiest step first."""


@dataclass(frozen=True, kw_only=True)
class SamplingPipeline:
    """A network with everything that decides an image but its id. Made by `build_pipeline`."""

    network: UNet
    schedule: Schedule
    diffusion: DiffusionSettings
    chain_settings: ChainSettings
    guidances: Mapping[str, Guidance] = field(default_factory=dict)

    def chain(self, seed: int, ids: Sequence[int], labels: Labels | None) -> Chain:
        """The chains of these samples together, each from its own noise."""
        s, device = self.chain_settings, next(self.network.parameters()).device
        side, channels = self.network.settings.image_size, self.network.settings.in_channels
        x_T = initial_noise(seed, ids, (channels, side, side)).to(device)
        noise = step_noise(seed, ids, (channels, side, side), device)
        denoise = self.denoiser
        condition = Condition(labels=None if labels is None else labels.to(device))
        if s.sampler == "ddim":
            return ddim(denoise, x_T, condition, self.schedule, noise, clip_x0=s.clip_x0, eta=s.eta)
        return ddpm(denoise, x_T, condition, self.schedule, noise, clip_x0=s.clip_x0)

    @property
    def denoiser(self) -> NoisePredictor:
        """The network on its schedule, guided."""
        return guided(make_predictor(self.network, self.schedule, self.diffusion.variance), self.guidances)

    @property
    def unguided(self) -> "SamplingPipeline":
        """The same without guidance: the same seeds give the images that guidance started from."""
        return replace(self, guidances={})

    @property
    def nfe(self) -> int:
        """Network evaluations a sample: one a step, and what each guidance adds to the steps that it guides."""
        steps = range(self.schedule.num_steps)
        return len(steps) + sum(g.passes * g.when(step) for g in self.guidances.values() for step in steps)


def build_pipeline(
    network: UNet,
    diffusion: DiffusionSettings,
    chain: ChainSettings,
    sag_settings: SelfAttentionGuidance | None = None,
    classifier: NoisyClassifier | None = None,
    classifier_settings: ClassifierGuidance | None = None,
    cfg_settings: ClassifierFreeGuidance | None = None,
) -> SamplingPipeline:
    """Check settings against the network, and put the recipe together. A guidance of scale 0 is left out.

    Raises:
        UserError: the site has no attention, the kernel does not fit, the variance is not the network's, a
            guidance lacks what it needs.
    """
    schedule = make_schedule(diffusion, chain.respacing)
    check_compatible(network.settings, diffusion, sag_settings, cfg_settings)
    guidances: dict[str, Guidance] = {}
    if sag_settings and sag_settings.scale:
        guidances["sag"] = sag(sag_settings, schedule)
    if classifier_settings and classifier_settings.scale:
        if classifier is None:
            raise UserError("`classifier.scale` needs a classifier, got none.")
        guidances["classifier"] = classifier_guidance(classifier_settings, classifier, schedule)
    if cfg_settings and cfg_settings.scale:
        guidances["cfg"] = classifier_free_guidance(cfg_settings)
    return SamplingPipeline(
        network=network, schedule=schedule, diffusion=diffusion, chain_settings=chain, guidances=guidances
    )


def run_to_end(chain: Chain) -> tuple[Image, Tensor | None]:
    """Run a chain to its end.

    Returns:
        The images, (B, C, H, W), and each pixel's share of guided steps in which it was masked, (B, 1, H, W) in
        [0, 1]; None where no step masked anything.
    """
    masked: Tensor | None = None
    guided_steps = 0
    x = torch.empty(0)
    for _, after, prediction in chain:
        x = after
        for mask in (d.notes["mask"].float() for d in prediction.directions.values() if "mask" in d.notes):
            masked, guided_steps = mask if masked is None else masked + mask, guided_steps + 1
    return x, None if masked is None else masked / guided_steps


def make_labels(run: RunSettings, ids: Sequence[int], network: UNet) -> Labels | None:
    """The class of each sample; None for an unconditional network or the null label.

    Raises:
        UserError: a class that the network does not have, or no null label.
    """
    check_labels(run, network.settings)
    classes = network.settings.num_classes
    if classes is None or run.labels == "null":
        return None
    if run.labels == "random":
        return torch.tensor(random_labels(run.seed, ids, classes))
    listed = list(range(classes)) if run.labels == "balanced" else run.label_list
    return torch.tensor([listed[i % len(listed)] for i in ids])


def x0_predictions(
    recipe: SamplingPipeline, seed: int, ids: Sequence[int], labels: Labels | None
) -> Iterator[tuple[int, Image, Mask | None]]:
    """A chain's estimate of the clean image, clipped, and what was masked, step by step, the noisiest first.

    Yields:
        (step, (B, C, H, W), (B, 1, H, W) bool or None where nothing was masked).
    """
    side, channels = recipe.network.settings.image_size, recipe.network.settings.in_channels
    x = initial_noise(seed, ids, (channels, side, side))
    for step, after, prediction in recipe.chain(seed, ids, labels):
        x0_hat = clip(x0_hat_from_eps(x.to(after), prediction.eps, recipe.schedule.alpha_bar(step)), True)
        masks = (d.notes["mask"] for d in prediction.directions.values() if "mask" in d.notes)
        yield step, x0_hat, next(masks, None)
        x = after
