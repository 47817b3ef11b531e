import torch

from sagl.data.dataloader import EpochDataset
from sagl.data.in_memory import InMemoryImages


def test_a_batch_that_is_read_at_once_is_that_of_its_items_of_any_epoch(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    dataset = InMemoryImages(
        torch.randint(0, 256, (7, 3, 4, 5), dtype=torch.uint8, generator=generator), torch.arange(7) * 3
    )
    items = [6, 0, 3, 3, 7, 20, 7 * 10**6 + 2]  # the last three of later epochs
    expected, images = torch.empty(2, len(items), 4, 5, 3, dtype=torch.uint8).unbind()
    labels = EpochDataset.read_batch(dataset, items, expected)
    monkeypatch.setattr(InMemoryImages, "__getitem__", None)
    assert dataset.read_batch(items, images) == labels == ([18, 0, 9, 9, 0, 18, 6], [])
    assert torch.equal(images, expected)
