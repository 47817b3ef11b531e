import numpy as np
import pytest
import torch

from sagl.diffusion.noise import (
    batch_rngs,
    chance,
    initial_noise,
    normal,
    random_labels,
    seed_dropout,
    step_noise,
    timestep_generator,
)

SHAPE = (3, 4, 5)
CPU = torch.device("cpu")


def drawn(seed, ids, step):
    """Step None is x_T."""
    return initial_noise(seed, ids, SHAPE) if step is None else step_noise(seed, ids, SHAPE, CPU)(step)


@pytest.mark.parametrize("step", [None, 0, 249])
def test_a_sample_has_the_same_noise_alone_and_in_any_batch(step):
    alone = drawn(3, [7], step)[0]
    assert alone.shape == SHAPE
    assert torch.equal(alone, drawn(3, [5, 6, 7, 8], step)[2])
    assert torch.equal(alone, drawn(3, [7, 100000], step)[0])
    assert torch.equal(alone, drawn(3, range(8), step)[7])


def test_seeds_ids_and_steps_all_draw_noise_of_their_own():
    keys = [(seed, i, step) for seed in (0, 1, 2) for i in (0, 1, 2) for step in (None, 0, 1, 2)]
    noises = torch.stack([drawn(seed, [i], step).flatten() for seed, i, step in keys]).double()
    correlation = torch.corrcoef(noises) - torch.eye(len(keys))
    assert float(correlation.abs().max()) < 0.6
    assert len({tuple(row.tolist()) for row in noises}) == len(keys)


def test_a_step_draws_the_same_however_often_and_in_whatever_order():
    noise = step_noise(0, [1, 2], SHAPE, CPU)
    first = [noise(step) for step in (3, 2, 1)]
    assert all(torch.equal(a, noise(step)) for a, step in zip(first, (3, 2, 1), strict=True))


def test_noise_is_standard_normal_in_float32():
    noise = initial_noise(0, range(40), (3, 16, 16))
    assert noise.dtype == torch.float32
    values = noise.double()
    count = values.numel()
    assert abs(float(values.mean())) < 5 / count**0.5
    assert abs(float(values.var()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float((values**4).mean()) - 3) < 5 * (96 / count) ** 0.5


def test_drawing_leaves_the_global_generators_alone_and_does_not_read_them():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    before = drawn(0, [0], None), drawn(0, [0], 4), random_labels(0, [0, 1], 10)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        after = drawn(0, [0], None), drawn(0, [0], 4), random_labels(0, [0, 1], 10)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2]


def test_labels_belong_to_seed_and_id_alone():
    labels = random_labels(3, range(20), 10)
    assert random_labels(3, [7], 10) == [labels[7]]
    assert random_labels(4, range(20), 10) != labels


def test_labels_are_uniform_over_the_classes():
    counts = np.bincount(random_labels(0, range(5000), 10), minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500)


def test_labels_do_not_move_noise():
    before = drawn(0, [5], None), drawn(0, [5], 3)
    for num_classes in (2, 1000):
        random_labels(0, range(8), num_classes)
    assert torch.equal(before[0], drawn(0, [5], None))
    assert torch.equal(before[1], drawn(0, [5], 3))


def test_the_noise_of_a_sample_is_this_for_ever():
    """A change here changes the images of every seed: it belongs in the changelog."""
    stream = np.random.default_rng(np.random.SeedSequence([9, 5, 0], spawn_key=(4,)))
    want = torch.from_numpy(stream.standard_normal(SHAPE, dtype=np.float32))
    assert torch.equal(drawn(9, [5], 3)[0], want)
    stream = np.random.default_rng(np.random.SeedSequence([9, 5, 0], spawn_key=(0,)))
    want = torch.from_numpy(stream.standard_normal(SHAPE, dtype=np.float32))
    assert torch.equal(drawn(9, [5], None)[0], want)


# ------------------------------------------------------------------------------------------------------ training


def test_a_training_sample_draws_by_seed_batch_and_its_place_alone():
    whole = normal(batch_rngs(3, 10, range(8)), SHAPE)
    assert torch.equal(normal(batch_rngs(3, 10, range(1, 8, 2)), SHAPE), whole[1::2])
    keys = [(seed, batch, place) for seed in (0, 1, 2) for batch in (0, 1, 2) for place in (0, 1, 2)]
    drawn = [normal(batch_rngs(seed, batch, [place]), SHAPE) for seed, batch, place in keys]
    drawn += [initial_noise(seed, [i], SHAPE) for seed in (0, 1, 2) for i in (0, 1, 2)]
    assert len({noise.numpy().tobytes() for noise in drawn}) == len(drawn)


def test_a_chance_is_its_share_of_the_samples():
    happened = chance(batch_rngs(0, 0, range(2000)), 0.3)
    assert (happened.dtype, tuple(happened.shape)) == (torch.bool, (2000,))
    assert abs(float(happened.float().mean()) - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5
    assert not chance(batch_rngs(0, 0, range(100)), 0.0).any()
    assert chance(batch_rngs(0, 0, range(100)), 1.0).all()


def test_timesteps_are_drawn_alike_on_all_ranks_and_dropout_on_none():
    first = torch.rand(5, generator=timestep_generator(3, 10))
    assert torch.equal(first, torch.rand(5, generator=timestep_generator(3, 10)))
    assert not torch.equal(first, torch.rand(5, generator=timestep_generator(3, 11)))
    with torch.random.fork_rng():
        masks = [(seed_dropout(3, *key), torch.rand(5))[1] for key in ((10, 0), (10, 1), (11, 0), (10, 0))]
    assert torch.equal(masks[0], masks[3])
    assert len({tuple(mask.tolist()) for mask in masks}) == 3
