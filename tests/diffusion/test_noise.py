import numpy as np
import pytest
import torch

from sagl.diffusion.noise import (
    SampleKeys,
    batch_rngs,
    bernoulli,
    guidance_rngs,
    initial_noise,
    randn,
    random_labels,
    seed_dropout,
    step_noise,
    timestep_generator,
)

SHAPE = (3, 4, 5)
CPU = torch.device("cpu")


def noise_of(seed, ids, step):
    """The noise of a step, or x_T for step None."""
    return initial_noise(seed, ids, SHAPE) if step is None else step_noise(seed, ids, SHAPE, CPU)(step)


@pytest.mark.parametrize("step", [None, 0, 249])
def test_a_sample_has_the_same_noise_alone_and_in_any_batch(step):
    alone = noise_of(3, [7], step)[0]
    assert alone.shape == SHAPE
    assert torch.equal(alone, noise_of(3, [5, 6, 7, 8], step)[2])
    assert torch.equal(alone, noise_of(3, [7, 100000], step)[0])
    assert torch.equal(alone, noise_of(3, range(8), step)[7])


def test_every_seed_id_and_step_has_noise_of_its_own():
    keys = [(seed, i, step) for seed in (0, 1, 2) for i in (0, 1, 2) for step in (None, 0, 1, 2)]
    noises = torch.stack([noise_of(seed, [i], step).flatten() for seed, i, step in keys]).double()
    correlation = torch.corrcoef(noises) - torch.eye(len(keys))
    assert float(correlation.abs().max()) < 0.6
    assert len({tuple(row.tolist()) for row in noises}) == len(keys)


def test_random_numbers_of_guidance_depend_on_seed_id_method_and_step_alone():
    def draw(seed, i, method, step):
        batch = guidance_rngs(SampleKeys(seed, [i + 7, i]), method, step)
        (alone,) = guidance_rngs(SampleKeys(seed, (i,)), method, step)
        value = alone.random()
        assert value == batch[1].random()
        return value

    keys = [(seed, i, method, step) for seed in (0, 1) for i in (0, 1, 2) for method in ("a", "b") for step in (0, 1)]
    assert len({draw(*key) for key in keys}) == len(keys)


def test_the_noise_of_a_step_does_not_depend_on_the_calls_before():
    noise = step_noise(0, [1, 2], SHAPE, CPU)
    first = [noise(step) for step in (3, 2, 1)]
    assert all(torch.equal(a, noise(step)) for a, step in zip(first, (3, 2, 1), strict=True))


def test_sampling_neither_reads_nor_changes_the_global_generators():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    before = noise_of(0, [0], None), noise_of(0, [0], 4), random_labels(0, [0, 1], 10)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        after = noise_of(0, [0], None), noise_of(0, [0], 4), random_labels(0, [0, 1], 10)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2]


def test_labels_depend_on_seed_and_id_alone():
    labels = random_labels(3, range(20), 10)
    assert random_labels(3, [7], 10) == [labels[7]]
    assert random_labels(4, range(20), 10) != labels


def test_labels_are_uniform_over_the_classes():
    counts = np.bincount(random_labels(0, range(5000), 10), minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500)


def test_the_noise_of_a_sample_never_changes():
    """A change here changes the images of every seed."""
    stream = np.random.default_rng(np.random.SeedSequence([9, 5, 0], spawn_key=(4,)))
    expected = torch.from_numpy(stream.standard_normal(SHAPE, dtype=np.float32))
    assert torch.equal(noise_of(9, [5], 3)[0], expected)
    stream = np.random.default_rng(np.random.SeedSequence([9, 5, 0], spawn_key=(0,)))
    expected = torch.from_numpy(stream.standard_normal(SHAPE, dtype=np.float32))
    assert torch.equal(noise_of(9, [5], None)[0], expected)


def test_the_noise_of_a_training_sample_depends_on_seed_batch_and_position_alone():
    whole = randn(batch_rngs(3, 10, range(8)), SHAPE)
    assert torch.equal(randn(batch_rngs(3, 10, range(1, 8, 2)), SHAPE), whole[1::2])
    keys = [(seed, batch, position) for seed in (0, 1, 2) for batch in (0, 1, 2) for position in (0, 1, 2)]
    noises = [randn(batch_rngs(seed, batch, [position]), SHAPE) for seed, batch, position in keys]
    noises += [initial_noise(seed, [i], SHAPE) for seed in (0, 1, 2) for i in (0, 1, 2)]
    assert len({noise.numpy().tobytes() for noise in noises}) == len(noises)


@pytest.mark.parametrize("num_threads", [3, 20])
def test_numbers_do_not_depend_on_the_number_of_threads(num_threads):
    first, second = batch_rngs(3, 10, range(8)), batch_rngs(3, 10, range(8))
    assert torch.equal(randn(first, SHAPE), randn(second, SHAPE, num_threads))
    assert [rng.random() for rng in first] == [rng.random() for rng in second]


def test_a_bernoulli_draw_has_its_probability():
    draws = bernoulli(batch_rngs(0, 0, range(2000)), 0.3)
    assert (draws.dtype, tuple(draws.shape)) == (torch.bool, (2000,))
    assert abs(float(draws.float().mean()) - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5
    assert not bernoulli(batch_rngs(0, 0, range(100)), 0.0).any()
    assert bernoulli(batch_rngs(0, 0, range(100)), 1.0).all()


def test_all_ranks_draw_the_same_timesteps_and_different_dropout():
    first = torch.rand(5, generator=timestep_generator(3, 10))
    assert torch.equal(first, torch.rand(5, generator=timestep_generator(3, 10)))
    assert not torch.equal(first, torch.rand(5, generator=timestep_generator(3, 11)))
    with torch.random.fork_rng():
        masks = [(seed_dropout(3, *key), torch.rand(5))[1] for key in ((10, 0), (10, 1), (11, 0), (10, 0))]
    assert torch.equal(masks[0], masks[3])
    assert len({tuple(mask.tolist()) for mask in masks}) == 3
