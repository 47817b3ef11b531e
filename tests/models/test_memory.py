import torch

from sagl.models.adm import UNet
from sagl.models.memory import MemoryTracker, estimate_memory
from sagl.settings.network import UNetSettings
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
