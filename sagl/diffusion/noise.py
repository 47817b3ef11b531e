"""Where random numbers begin: sampling draws by (seed, sample id, step), training by (seed, batch, place in it).

Nothing depends on world size or on what was drawn before, so any sample can be made again alone, and a training that
was stopped goes on as if it had not been. The exception is dropout, which draws for a rank's whole tensors.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from sagl.shapes import Image

INITIAL = 0
"""Key of x_T, the same for every respacing; step k draws under key k + 1."""

SAMPLE, TIMESTEPS, DROPOUT = 2, 3, 4
"""Keys of what training draws; never 0, with which a short key is filled up."""

SampleRngs = Sequence[np.random.Generator]
"""A stream of random numbers for each sample of a batch."""

StepNoise = Callable[[int], Image]
"""step -> (B, C, H, W) standard normal."""


def initial_noise(seed: int, ids: Sequence[int], shape: Sequence[int]) -> Image:
    """x_T of each sample: -> (B, C, H, W) float32 on the CPU."""
    return _draw(seed, ids, INITIAL, shape)


def step_noise(seed: int, ids: Sequence[int], shape: tuple[int, int, int], device: torch.device) -> StepNoise:
    """The noise that a step adds, as a function of the step alone."""
    return lambda step: _draw(seed, ids, step + 1, shape).to(device)


def random_labels(seed: int, ids: Sequence[int], num_classes: int) -> list[int]:
    """A class for each sample, uniform; a stream of its own, so that labels never move noise."""
    return [int(np.random.default_rng([seed, i, 1]).integers(num_classes)) for i in ids]


def _draw(seed: int, ids: Sequence[int], key: int, shape: Sequence[int]) -> Image:
    """Sample i draws from SeedSequence([seed, i, 0]), a stream a key (128 bits; a torch.Generator keeps 32)."""
    rngs = (np.random.SeedSequence([seed, i, 0], spawn_key=(key,)) for i in ids)
    return normal([np.random.default_rng(stream) for stream in rngs], shape)


# --------------------------------------------------------------------------------------------------- training


def batch_rngs(seed: int, batch: int, places: Iterable[int]) -> SampleRngs:
    """A stream for each sample of a training batch, by its place in the batch of all ranks together."""
    return [np.random.default_rng([seed, batch, place, SAMPLE]) for place in places]


def timestep_generator(seed: int, batch: int) -> torch.Generator:
    """The same on every rank: all draw the timesteps of the whole batch, and each takes its own."""
    return torch.Generator().manual_seed(_word([seed, batch, 0, TIMESTEPS]))


def seed_dropout(seed: int, batch: int, rank: int) -> None:
    """Dropout can only draw from the devices' own generators, so these begin anew with every training batch."""
    torch.manual_seed(_word([seed, batch, rank, DROPOUT]))


def normal(rngs: SampleRngs, shape: Sequence[int]) -> Image:
    """Standard normal, each sample from its stream: -> (B, *shape) float32 on the CPU."""
    return torch.from_numpy(np.stack([rng.standard_normal(tuple(shape), dtype=np.float32) for rng in rngs]))


def chance(rngs: SampleRngs, probability: float) -> Tensor:
    """Which samples something happens to: -> (B,) bool."""
    return torch.tensor([bool(rng.random() < probability) for rng in rngs])


def _word(key: Sequence[int]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])
