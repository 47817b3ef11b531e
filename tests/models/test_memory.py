import torch

from sagl.models.adm import UNet
from sagl.models.memory import MemoryTracker, estimate_memory
from sagl.settings.network import UNetSettings
from tests.helpers.tiny import COLOUR

KB = 1024


def test_bytes_are_counted_when_made_and_when_freed():
    x = torch.ones(256)
    with MemoryTracker() as live:
        first = x + 1
        assert live.current == KB
        view = first.view(16, 16).mT
        second = torch.cat([first, first])
        assert (live.current, live.peak) == (3 * KB, 3 * KB)
        del first, second
        assert (live.current, live.peak) == (KB, 3 * KB)
        del view
        assert live.current == 0


def test_what_is_written_in_place_or_was_there_before_is_not_counted():
    x = torch.ones(256)
    with MemoryTracker() as live:
        x.add_(1).view(4, 64).mul_(2)
    assert (live.current, live.peak) == (0, 0)


def test_a_forward_is_counted_without_computing_as_it_takes_when_computed():
    s = UNetSettings(**COLOUR)
    weights, each = estimate_memory(s, torch.float32)
    network = UNet(s).eval()
    assert weights == sum(p.numel() * 4 for p in network.parameters())
    labels = None if s.num_classes is None else torch.zeros(1, dtype=torch.long)
    with torch.inference_mode(), MemoryTracker() as live:
        network(torch.zeros(1, s.in_channels, s.image_size, s.image_size), torch.zeros(1), labels)
    assert 0.5 * each <= live.peak <= 1.5 * each
