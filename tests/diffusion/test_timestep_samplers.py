import numpy as np
import pytest
import torch

from sagl.diffusion.timestep_samplers import LossSecondMomentTimesteps, UniformTimesteps, van_der_corput_timesteps
from tests.helpers.reference_values import generator


def sampler_of(losses_by_timestep, history=4):
    """A sampler that has recorded these losses at every timestep."""
    sampler = LossSecondMomentTimesteps(len(losses_by_timestep), history)
    for t, losses in enumerate(losses_by_timestep):
        sampler.update(torch.full((len(losses),), t), torch.tensor(losses))
    return sampler


def test_uniform_timesteps_reach_both_ends_with_weight_one():
    timesteps, weights = UniformTimesteps(5).sample(500, generator(0))
    assert sorted(set(timesteps.tolist())) == [0, 1, 2, 3, 4]
    assert timesteps.dtype == torch.int64
    assert weights.tolist() == [1.0] * 500


def test_timesteps_are_uniform_until_every_history_is_full():
    sampler = sampler_of([[9.0] * 4, [1.0] * 4, [5.0] * 3])
    assert sampler.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    _, weights = sampler.sample(10, generator(0))
    assert weights.tolist() == pytest.approx([1.0] * 10)
    sampler.update(torch.tensor([2]), torch.tensor([5.0]))
    assert sampler.probabilities().tolist() != pytest.approx([1 / 3] * 3)


def test_probabilities_follow_the_root_mean_square_and_are_never_0():
    sampler = sampler_of([[3.0] * 4, [1.0, 7.0, 1.0, 7.0], [2.0] * 4])
    roots = np.array([3.0, 5.0, 2.0])
    expected = 0.999 * roots / roots.sum() + 0.001 / 3
    np.testing.assert_allclose(sampler.probabilities().numpy(), expected, rtol=1e-12)
    assert float(sampler_of([[0.0] * 4, [1.0] * 4]).probabilities().min()) == pytest.approx(0.0005)


def test_a_full_history_drops_its_oldest_loss():
    sampler = sampler_of([[1.0, 2.0, 3.0, 4.0], [1.0] * 4])
    sampler.update(torch.tensor([0, 0]), torch.tensor([5.0, 6.0]))
    assert sampler.losses[0].tolist() == [3.0, 4.0, 5.0, 6.0]
    assert sampler.losses[1].tolist() == [1.0] * 4


def test_a_sampler_continues_from_its_state():
    sampler, restored = sampler_of([[3.0] * 4, [1.0] * 4]), LossSecondMomentTimesteps(2, history=4)
    restored.load_state_dict(sampler.state_dict())
    assert torch.equal(restored.probabilities(), sampler.probabilities())
    restored.load_state_dict({})
    assert torch.equal(restored.losses, sampler.losses)


def test_timesteps_follow_the_probabilities_and_weights_keep_the_mean_unbiased():
    sampler = sampler_of([[k + 1.0] * 4 for k in range(8)])
    p, count = sampler.probabilities(), 20000
    timesteps, weights = sampler.sample(count, generator(0))
    torch.testing.assert_close(weights.double(), 1 / (8 * p[timesteps]), rtol=1e-6, atol=0)
    frequency = torch.bincount(timesteps, minlength=8) / count
    assert float((frequency - p).abs().max()) < 5 / count**0.5
    assert float((weights * torch.linspace(0, 1, 8)[timesteps]).mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("sampler", [UniformTimesteps(50), sampler_of([[1.0, 2.0]] * 50, history=2)])
def test_timesteps_depend_on_the_generator_alone(sampler):
    first, second = (sampler.sample(20, generator(1))[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("count", [1, 2, 8, 64, 512])
def test_the_timesteps_of_the_first_ids_are_evenly_spread(count):
    timesteps = van_der_corput_timesteps(range(count), 1024)
    assert sorted(timesteps.tolist()) == [k * 1024 // count for k in range(count)]
    pair = van_der_corput_timesteps([5, 3], 1000)
    assert pair.tolist() == [van_der_corput_timesteps([k], 1000).item() for k in (5, 3)]
