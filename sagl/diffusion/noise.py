"""The only place that draws for sampling: a pure function of (seed, sample id, step).

Nothing depends on rank, world size, batch size or what was drawn before, so any sample can be made again alone.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from sagl.shapes import Image

INITIAL = 0
"""Key of x_T, the same for every respacing; step k draws under key k + 1."""

StepNoise = Callable[[int], Image]
"""step -> (B, C, H, W) standard normal."""


def initial_noise(seed: int, ids: Sequence[int], shape: tuple[int, int, int]) -> Image:
    """x_T of each sample: -> (B, C, H, W) float32 on the CPU."""
    return _draw(seed, ids, INITIAL, shape)


def step_noise(seed: int, ids: Sequence[int], shape: tuple[int, int, int], device: torch.device) -> StepNoise:
    """The noise that a step adds, as a function of the step alone."""
    return lambda step: _draw(seed, ids, step + 1, shape).to(device)


def random_labels(seed: int, ids: Sequence[int], num_classes: int) -> list[int]:
    """A class for each sample, uniform; a stream of its own, so that labels never move noise."""
    return [int(np.random.default_rng([seed, i, 1]).integers(num_classes)) for i in ids]


def _draw(seed: int, ids: Sequence[int], key: int, shape: tuple[int, int, int]) -> Image:
    """Sample i draws from SeedSequence([seed, i, 0]), a stream a key (128 bits; a torch.Generator keeps 32)."""
    streams = (np.random.SeedSequence([seed, i, 0], spawn_key=(key,)) for i in ids)
    drawn = [np.random.default_rng(stream).standard_normal(shape, dtype=np.float32) for stream in streams]
    return torch.from_numpy(np.stack(drawn))
