import torch
from torch import nn

from sagl.modules.training_module import built_from_seed, fixed_noise


def test_first_weights_come_from_the_seed_alone_and_leave_the_global_generator_as_it_was():
    torch.manual_seed(1)
    want = torch.randn(3)
    torch.manual_seed(1)
    first, other = (built_from_seed(lambda: nn.Linear(3, 3), seed) for seed in (5, 6))
    assert torch.equal(torch.randn(3), want)
    assert torch.equal(built_from_seed(lambda: nn.Linear(3, 3), 5).weight, first.weight)
    assert not torch.equal(first.weight, other.weight)


def test_validation_is_shown_the_same_noise_at_evenly_spread_timesteps_batch_by_batch():
    x_0 = torch.zeros(8, 1, 4, 4)
    (timesteps, noise), (_, again), (_, other) = (fixed_noise(x_0, 1000, batch) for batch in (2, 2, 3))
    assert timesteps.tolist() == [0, 125, 250, 375, 500, 625, 750, 875]
    assert torch.equal(noise, again)
    assert not torch.equal(noise, other)
