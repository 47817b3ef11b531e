"""Settings and sample ids -> chain of images: the one room that sees guidance and samplers both.

The command line, previews and measurements all make their images here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sagl.diffusion.denoiser import Condition, Prediction, as_denoiser
from sagl.diffusion.noise import initial_noise, random_labels, step_noise
from sagl.diffusion.schedule import Schedule, make_schedule
from sagl.guidance.blur import fitting_kernel
from sagl.guidance.classifier import Logits, classifier_guidance
from sagl.guidance.direction import Guidance, guided
from sagl.guidance.sag import sag
from sagl.models.adm import UNet
from sagl.samplers.ddim import ddim
from sagl.samplers.ddpm import ddpm
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.errors import UserError, require
from sagl.settings.guidance import ClassifierGuidance, SelfAttentionGuidance
from sagl.settings.sampling import ChainSettings, RunSettings
from sagl.shapes import Image, Labels, Site

Chain = Iterator[tuple[int, Image, Prediction]]
"""(step, x after it, the prediction behind it), the noisiest step first."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A network with everything that decides an image but its id. Made by `prepare`."""

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
        denoise = guided(as_denoiser(self.network, self.schedule, self.diffusion.variance), self.guidances)
        condition = Condition(labels=None if labels is None else labels.to(device))
        if s.sampler == "ddim":
            return ddim(denoise, x_T, condition, self.schedule, noise, clip_x0=s.clip_x0, eta=s.eta)
        return ddpm(denoise, x_T, condition, self.schedule, noise, clip_x0=s.clip_x0)

    @property
    def unguided(self) -> "Recipe":
        """The same without guidance: the same seeds give the images that guidance started from."""
        return replace(self, guidances={})

    @property
    def nfe(self) -> int:
        """Network evaluations a sample: one a step, and one more for every step that SAG guides."""
        sag_steps = sum(self.guidances["sag"].when(step) for step in self._steps) if "sag" in self.guidances else 0
        return self.schedule.num_steps + sag_steps

    @property
    def _steps(self) -> range:
        return range(self.schedule.num_steps)


def prepare(
    network: UNet,
    diffusion: DiffusionSettings,
    chain: ChainSettings,
    sag_settings: SelfAttentionGuidance | None = None,
    classifier: Logits | None = None,
    classifier_settings: ClassifierGuidance | None = None,
) -> Recipe:
    """Check settings against the network, and put the recipe together. A guidance of scale 0 is left out.

    Raises:
        UserError: the site has no attention, the kernel does not fit, the variance is not the network's, a
            guidance lacks what it needs.
    """
    schedule = make_schedule(diffusion, chain.respacing)
    require(
        network.settings.learn_sigma or diffusion.variance != "learned_range",
        "`variance` learned_range needs a network with learn_sigma: true. Set fixed_small or fixed_large.",
    )
    guidances: dict[str, Guidance] = {}
    if sag_settings and sag_settings.scale:
        network.require_site(Site(sag_settings.site, sag_settings.heads))
        fitting_kernel(sag_settings.kernel_size, network.settings.image_size)
        guidances["sag"] = sag(sag_settings, schedule)
    if classifier_settings and classifier_settings.scale:
        if classifier is None:
            raise UserError("`classifier.scale` needs a classifier, got none.")
        guidances["classifier"] = classifier_guidance(classifier_settings, classifier, schedule)
    return Recipe(network=network, schedule=schedule, diffusion=diffusion, chain_settings=chain, guidances=guidances)


def collect(chain: Chain) -> tuple[Image, Tensor | None]:
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


def micro_batches(run: RunSettings) -> Iterator[list[int]]:
    """Sample ids in groups of exactly batch_size, which start at multiples of it; the last may go over the end."""
    first = run.first_id - run.first_id % run.batch_size
    for start in range(first, run.first_id + run.num_samples, run.batch_size):
        yield list(range(start, start + run.batch_size))


def labels_of(run: RunSettings, ids: Sequence[int], network: UNet) -> Labels | None:
    """The class of each sample; None for an unconditional network or the null label.

    Raises:
        UserError: a class that the network does not have, or no null label.
    """
    classes = network.settings.num_classes
    if classes is None:
        require(run.labels in ("random", "null"), f"`labels` is for class-conditional networks, got {run.labels!r}.")
        return None
    if run.labels == "null":
        require(network.settings.null_label, "`labels` null needs a network with a null label; this one has none.")
        return None
    if run.labels == "random":
        return torch.tensor(random_labels(run.seed, ids, classes))
    listed = list(range(classes)) if run.labels == "balanced" else run.listed_labels
    require(max(listed) < classes, f"`labels` must be classes 0 … {classes - 1}, got {max(listed)}.")
    return torch.tensor([listed[i % len(listed)] for i in ids])
