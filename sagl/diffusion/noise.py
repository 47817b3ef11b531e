"""Counter-based random numbers.

Sampling draws by (seed, sample id, step), training by (seed, batch, position in the batch of all ranks). Nothing
depends on the number of processes or on earlier draws, so any sample can be drawn again alone and a training can
resume exactly. Dropout is the exception: it draws for a rank's whole tensors.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from sagl.errors import UserError
from sagl.shapes import Image

INITIAL_KEY = 0
"""Spawn key of x_T, the same for every respacing; step k draws under key k + 1."""
GUIDANCE_KEY = 2
"""Last word of the seeds of guidance methods; 0 is that of noise, 1 that of labels."""
SAMPLE_KEY, TIMESTEPS_KEY, DROPOUT_KEY = 2, 3, 4
"""Last word of the seeds of training; not 0, because NumPy pads short seeds with zeros."""

SampleRngs = Sequence[np.random.Generator]
"""One generator per sample of a batch."""
StepNoise = Callable[[int], Image]
"""step -> (B, C, H, W) standard normal."""


class SampleKeys(NamedTuple):
    """Seed and ids of the samples of a batch, from which all their random numbers derive."""

    seed: int
    ids: Sequence[int]


def initial_noise(seed: int, ids: Sequence[int], shape: Sequence[int]) -> Image:
    """Draw x_T of each sample: -> (B, C, H, W) float32 on the CPU."""
    return _sampling_noise(seed, ids, INITIAL_KEY, shape)


def step_noise(seed: int, ids: Sequence[int], shape: tuple[int, int, int], device: torch.device) -> StepNoise:
    """Return the noise of the sampler's steps as a function of the step."""
    return lambda step: _sampling_noise(seed, ids, step + 1, shape).to(device)


def random_labels(seed: int, ids: Sequence[int], num_classes: int) -> list[int]:
    """Draw a uniform class for each sample, from a separate random stream, so that labels do not affect the noise."""
    return [int(np.random.default_rng([seed, i, 1]).integers(num_classes)) for i in ids]


def guidance_rngs(samples: SampleKeys | None, method: str, step: int) -> SampleRngs:
    """Return a generator for each sample, for the random numbers that a guidance method draws in a step.

    Raises:
        UserError: there are no `samples`.
    """
    if samples is None:
        raise UserError(f"`samples` must be given for the random numbers of {method} guidance, got none.")
    key = (crc32(method.encode()), step)
    streams = (np.random.SeedSequence([samples.seed, i, GUIDANCE_KEY], spawn_key=key) for i in samples.ids)
    return [np.random.default_rng(stream) for stream in streams]


def _sampling_noise(seed: int, ids: Sequence[int], key: int, shape: Sequence[int]) -> Image:
    # NumPy's SeedSequence keeps 128 bits of (seed, id) and key; torch.Generator keeps 32
    streams = (np.random.SeedSequence([seed, i, 0], spawn_key=(key,)) for i in ids)
    return randn([np.random.default_rng(stream) for stream in streams], shape)


def batch_rngs(seed: int, batch: int, positions: Iterable[int]) -> SampleRngs:
    """Return a generator for each sample of a training batch, by its position in the batch of all ranks."""
    return [np.random.default_rng([seed, batch, position, SAMPLE_KEY]) for position in positions]


def timestep_generator(seed: int, batch: int) -> torch.Generator:
    """Return the generator of a training batch's timesteps, the same on every rank."""
    return torch.Generator().manual_seed(_seed32([seed, batch, 0, TIMESTEPS_KEY]))


def seed_dropout(seed: int, batch: int, rank: int) -> None:
    """Seed the devices' global generators, the only ones that dropout can use, for one training batch."""
    torch.manual_seed(_seed32([seed, batch, rank, DROPOUT_KEY]))


def randn(rngs: SampleRngs, shape: Sequence[int], num_threads: int = 1) -> Image:
    """Draw standard normal numbers, each sample from its generator: -> (B, *shape) float32 on the CPU.

    The numbers are the same for any number of threads.
    """
    noise = np.empty((len(rngs), *shape), np.float32)

    def draw(first: int) -> None:
        for rng, out in zip(rngs[first::num_threads], noise[first::num_threads], strict=True):
            rng.standard_normal(dtype=np.float32, out=out)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(draw, range(num_threads)))
    return torch.from_numpy(noise)


def bernoulli(rngs: SampleRngs, probability: float) -> Tensor:
    """Draw one Bernoulli(probability) per sample: -> (B,) bool."""
    return torch.tensor([bool(rng.random() < probability) for rng in rngs])


def _seed32(key: Sequence[int]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])
