import pytest
import torch
from torch.utils.data import SequentialSampler

from sagl.data.dataloader import Images, Loader, LoaderSettings
from sagl.data.shared_memory import NUM_PREFETCHED, SharedMemoryBatches, SlotBatchSampler
from tests.helpers.tiny import QUIET

pytestmark = QUIET


class Ramps(Images):
    """Image i holds i everywhere, and its columns in the second channel."""

    def __len__(self):
        return 50

    def __getitem__(self, item):
        columns = torch.arange(5, dtype=torch.uint8).expand(4, 5)
        return torch.stack([torch.full((4, 5), item, dtype=torch.uint8), columns]), torch.tensor(item)


def loader(batch_size=3, num_workers=2):
    reading = LoaderSettings(batch_size=batch_size, num_workers=num_workers, shape=(4, 5, 2))
    return Loader(Ramps(), SequentialSampler(range(50)), reading)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_are_whole_in_order_and_stay_what_they_are_after_their_slot_is_written_anew(num_workers):
    kept = [(images, labels) for _ in range(2) for images, labels in loader(num_workers=num_workers)]
    assert len(kept) == 2 * 17
    for k, (images, labels) in enumerate(kept):
        first = 3 * (k % 17)
        assert labels.tolist() == list(range(first, min(first + 3, 50)))
        assert images.shape == (len(labels), 2, 4, 5)
        assert images[:, 0].flatten(1).unique(dim=1).flatten().tolist() == labels.tolist()
        assert images[0, 1, 3].tolist() == [0, 1, 2, 3, 4]


def test_an_epoch_that_is_left_in_the_middle_harms_no_later_one():
    both = loader()
    for _ in range(3):
        batches = iter(both)
        for k in range(5):
            images, labels = next(batches)
            assert images[:, 0, 0, 0].tolist() == labels.tolist() == [3 * k, 3 * k + 1, 3 * k + 2]


def test_no_slot_is_written_while_its_batch_may_still_be_under_way():
    shared = SharedMemoryBatches(Ramps(), (4, 5, 2), 3, readers=2)
    slots = [slot for slot, *_ in SlotBatchSampler([[0]] * 20, len(shared.slots))]
    under_way = 2 * NUM_PREFETCHED + 1
    assert all(len(set(slots[k : k + under_way])) == under_way for k in range(20 - under_way))


def test_images_lie_as_the_network_wants_them():
    images, _ = next(iter(loader()))
    assert images.is_contiguous(memory_format=torch.channels_last)
