import torch
from torch import nn

from sagl.modules.training_module import seeded_init


def test_first_weights_come_from_the_seed_alone_and_leave_the_global_generator_as_it_was():
    torch.manual_seed(1)
    want = torch.randn(3)
    torch.manual_seed(1)
    first, other = (seeded_init(lambda: nn.Linear(3, 3), seed) for seed in (5, 6))
    assert torch.equal(torch.randn(3), want)
    assert torch.equal(seeded_init(lambda: nn.Linear(3, 3), 5).weight, first.weight)
    assert not torch.equal(first.weight, other.weight)
