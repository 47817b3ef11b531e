"""Training data of direction heads: the steps of chains of the guided sampler.

Every guided step evaluates the network for x_t and for the weak prediction, which is an input of the head and its
target. A round is a number of whole chains. It is a function of its seed and number alone, so that a training needs no
stored chains to resume.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sagl.diffusion.noise import SampleKeys, initial_noise, step_noise
from sagl.diffusion.predictor import Condition, NoisePredictor, Prediction, make_predictor
from sagl.errors import require
from sagl.guidance.direction_head import head_inputs, head_maps, request_maps
from sagl.guidance.masks import LoadClassAttention, load_class_attention
from sagl.models.adm import UNet
from sagl.models.direction_head import NUM_LEVELS, Pairs
from sagl.sampling.pipeline import SamplingPipeline, build_pipeline, load_weak_network
from sagl.settings.direction_head import DirectionHeadOptions
from sagl.settings.guidance import GuidanceSettings
from sagl.settings.sampling import SamplerSettings
from sagl.shapes import Image, Labels

FIRST_ID, FIRST_VALIDATION_ID = 2**31, 2**30
"""Ids of the first chains of training and validation, far from those of samples."""
ANY_STEPS = SamplerSettings(respacing="1")
"""Sampler of a pipeline that samples nothing; every process has one step."""
GROUPS_KEY = 5
"""Last word of the seeds that draw the samplers, steps, scales and labels of groups."""


@dataclass(frozen=True, kw_only=True)
class DirectionPairs:
    """Source of the pairs of a network and a method."""

    pipeline: SamplingPipeline
    """The network, on its device."""
    guidance: GuidanceSettings
    """Settings of the method; options that do not change its weak prediction are not used."""
    options: DirectionHeadOptions
    seed: int
    weak_networks: dict[tuple[str, str], UNet] = field(default_factory=dict)
    """Weaker networks of autoguidance that are loaded, by name and weights."""
    load_attention: LoadClassAttention = field(default_factory=lambda: cache(load_class_attention))
    """Load the class attention of a DINO transformer, once per file."""

    def __deepcopy__(self, _: dict[int, Any]) -> "DirectionPairs":
        """Return itself: a copy of a module in training shares the frozen network."""
        return self

    def to(self, device: torch.device) -> None:
        """Move the network, and the weaker ones that are loaded."""
        for network in (self.pipeline.network, *self.weak_networks.values()):
            network.to(device)

    def training_round(self, index: int, rank: int = 0, world_size: int = 1) -> Pairs:
        """Sample the chains of a round that are this rank's."""
        return self._sample(FIRST_ID, index, range(rank, self.options.num_groups, world_size))

    def validation_pairs(self, rank: int = 0, world_size: int = 1) -> Pairs:
        """Sample the held-out chains that are this rank's."""
        return self._sample(FIRST_VALIDATION_ID, 0, range(rank, self.options.num_validation_groups, world_size))

    def levels(self) -> Tensor:
        """Return the root mean squares of direction, high-pass and masked high-pass by timestep.

        They are those of one group of ancestral chains without labels, as far as network and method allow that; in a
        process of fewer than NUM_LEVELS timesteps, they are interpolated between these.

        Returns:
            (2 or 3, NUM_LEVELS), at evenly spaced timesteps, the cleanest first.
        """
        count = min(NUM_LEVELS, self.pipeline.diffusion.num_timesteps)
        options = replace(self.options, null_fraction=1.0, samplers=("ddpm",), num_steps=(count, count))
        pairs = replace(self, options=options)._sample(FIRST_ID, 0, range(1))
        images = pairs.images[:, :-1] if self.has_mask else pairs.images
        _x_t, _x0_hat, *high_pass = images.split(self.pipeline.network.settings.in_channels, dim=1)
        by_step = torch.stack([pairs.direction, *high_pass]).unflatten(1, (count, -1)).flip(1)
        levels = by_step.square().mean(dim=(2, 3, 4, 5)).sqrt().clamp(min=1e-6)
        return F.interpolate(levels[None], size=NUM_LEVELS, mode="linear", align_corners=True)[0]

    @property
    def has_mask(self) -> bool:
        """True if the method has a mask, as SAG has."""
        return self._guided(ANY_STEPS).guidances[self.guidance.group].mask is not None

    def _guided(self, sampler: SamplerSettings) -> SamplingPipeline:
        """Return the pipeline with the method at scale 1 in every step."""
        method = type(self.guidance)(scale=1.0, **self.guidance.weak_prediction_settings)
        return build_pipeline(
            self.pipeline.network,
            self.pipeline.diffusion,
            sampler,
            {method.group: method},
            load_network=self._load_network,
            load_attention=self.load_attention,
        )

    def _load_network(self, name: str, weights: str) -> UNet:
        """Load a weaker network once; every group of chains uses the same."""
        key = name, weights
        if key not in self.weak_networks:
            self.weak_networks[key] = load_weak_network(name, weights, self.pipeline.network, self.pipeline.diffusion)
        return self.weak_networks[key]

    @torch.no_grad()
    def _sample(self, first_id: int, index: int, groups: range) -> Pairs:
        require(len(groups) > 0, "`direction_head` must have at least as many groups of chains as processes.")
        return Pairs.concatenate(self._sample_group(first_id, index, group) for group in groups)

    def _sample_group(self, first_id: int, index: int, group: int) -> Pairs:
        """Sample the chains of one group: of one sampler and number of steps, with scales and labels of their own."""
        o, network = self.options, self.pipeline.network
        start = first_id + (index * max(o.num_groups, o.num_validation_groups) + group) * o.group_size
        ids = range(start, start + o.group_size)
        rng, device = np.random.default_rng([self.seed, start, GROUPS_KEY]), next(network.parameters()).device
        sampler = o.samplers[rng.integers(len(o.samplers))]
        respacing = str(rng.integers(o.num_steps[0], o.num_steps[1] + 1))
        pipeline = self._guided(SamplerSettings(sampler=sampler, respacing=respacing))
        scales = torch.from_numpy(rng.uniform(*o.scales, o.group_size)).float()[:, None, None, None].to(device)
        needs_labels = self.guidance.needs_labels or pipeline.guidances[self.guidance.group].needs_labels
        labels = self._draw_labels(rng, may_be_null=not needs_labels)
        condition = Condition(labels=None if labels is None else labels.to(device), samples=SampleKeys(self.seed, ids))
        x_T = initial_noise(self.seed, ids, pipeline.image_shape).to(device)
        noise = step_noise(self.seed, ids, pipeline.image_shape, device)
        pairs: list[Pairs] = []
        predict = self._recording_predictor(pipeline, scales, pairs)
        for _ in pipeline.sampler(predict, x_T, condition, pipeline.schedule, noise):
            pass
        return Pairs.concatenate(pairs)

    def _recording_predictor(self, pipeline: SamplingPipeline, scales: Tensor, pairs: list[Pairs]) -> NoisePredictor:
        """Return the guided predictor of a group, which appends the pairs of each step to `pairs`."""
        schedule, guidance = pipeline.schedule, pipeline.guidances[self.guidance.group]
        predict = make_predictor(pipeline.network, schedule, pipeline.diffusion.variance)
        inputs_of, settings = head_inputs(guidance.mask, self.guidance, schedule), pipeline.network.settings

        def record(x_t: Image, step: int, condition: Condition) -> Prediction:
            """Predict with and without the weak input, append the pair, and return the guided prediction."""
            base_pred = predict(x_t, step, request_maps(guidance.prepare_condition(condition), settings))
            direction = guidance.term(predict, x_t, step, condition, base_pred).eps
            assert isinstance(direction, Tensor)
            timesteps = schedule.timestep(step, len(x_t), x_t.device)
            images = inputs_of(x_t, step, condition, base_pred)
            maps = tuple(to_float16(feature_map) for feature_map in head_maps(base_pred, settings))
            pairs.append(Pairs(images, maps, timesteps, direction))
            return replace(base_pred, eps=base_pred.eps + scales * direction)

        return record

    def _draw_labels(self, rng: np.random.Generator, *, may_be_null: bool) -> Labels | None:
        """Draw a label for every chain of a group; the null label has the number behind the classes."""
        s, size = self.pipeline.network.settings, self.options.group_size
        if s.num_classes is None:
            return None
        labels = torch.from_numpy(rng.integers(s.num_classes, size=size))
        is_null = torch.from_numpy(rng.random(size) < self.options.null_fraction)
        return torch.where(is_null, s.num_classes, labels) if s.null_label and may_be_null else labels


def to_float16(feature_map: Tensor) -> Tensor:
    """Convert to float16; numbers beyond its range become its largest or smallest."""
    limit = torch.finfo(torch.float16).max
    return feature_map.half().clamp(-limit, limit)
