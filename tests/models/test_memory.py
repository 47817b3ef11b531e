import pytest
import torch

from sagl.models.adm import Classifier, UNet
from sagl.models.memory import MemoryTracker, estimate_gradient_memory, estimate_memory, max_batch_size
from sagl.models.zoo import RELEASED
from sagl.settings.network import ClassifierSettings, UNetSettings
from tests.helpers.networks import COLOUR

KB = 1024


def test_bytes_are_counted_when_allocated_and_when_freed():
    x = torch.ones(256)
    with MemoryTracker() as memory:
        first = x + 1
        assert memory.current == KB
        view = first.view(16, 16).mT
        second = torch.cat([first, first])
        assert (memory.current, memory.peak) == (3 * KB, 3 * KB)
        del first, second
        assert (memory.current, memory.peak) == (KB, 3 * KB)
        del view
        assert memory.current == 0


def test_inputs_and_tensors_written_in_place_are_not_counted():
    x = torch.ones(256)
    with MemoryTracker() as memory:
        x.add_(1).view(4, 64).mul_(2)
    assert (memory.current, memory.peak) == (0, 0)


def test_the_estimate_without_computing_is_near_the_memory_of_a_forward_pass():
    s = UNetSettings(**COLOUR)
    weights, peak = estimate_memory(s, torch.float32)
    network = UNet(s).eval()
    assert weights == sum(p.numel() * 4 for p in network.parameters())
    labels = None if s.num_classes is None else torch.zeros(1, dtype=torch.long)
    with torch.inference_mode(), MemoryTracker() as memory:
        network(torch.zeros(1, s.in_channels, s.image_size, s.image_size), torch.zeros(1), labels)
    assert 0.5 * peak <= memory.peak <= 1.5 * peak


@pytest.mark.parametrize(("name", "size"), [("lsun_cat", 63), ("imagenet512", 21)])
def test_a_batch_is_so_small_that_32_bit_indices_count_its_largest_map(name, size):
    """512 channels of 256x256 pixels in 64 images are exactly 2^31 elements, one too many."""
    assert max_batch_size(RELEASED[name].settings) == size


def test_the_gradient_of_a_classifier_takes_more_than_its_forward_pass():
    s = ClassifierSettings(
        image_size=16, num_channels=32, channel_mult=(1, 2), attention_resolutions=(8,), num_classes=5
    )
    weights, peak = estimate_gradient_memory(s, torch.float32)
    network = Classifier(s).eval().requires_grad_(False)
    assert weights == sum(p.numel() * 4 for p in network.parameters())
    x = torch.zeros(1, 3, 16, 16)
    with torch.inference_mode(), MemoryTracker() as forward:
        network(x, torch.zeros(1))
    with MemoryTracker() as gradient:
        torch.autograd.grad(network(x.requires_grad_(), torch.zeros(1)).sum(), x)
    assert 0.5 * peak <= gradient.peak <= 1.5 * peak
    assert peak > 1.5 * forward.peak
