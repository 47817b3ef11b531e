from itertools import pairwise

import pytest
import torch

from sagl.data.loading import Images, TrainingLoader, TrainingOrder, training_loader
from sagl.settings.errors import UserError
from tests.tiny import QUIET

pytestmark = QUIET


class Numbers(Images):
    """Image i is a pixel of value i; the label is the item asked for, epoch and all."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        return torch.full((1, 1, 1), item % self.count), torch.tensor(item)


def loader(count=23, batch_size=4, seed=0, rank=0, world_size=1, num_workers=0):
    return TrainingLoader(Numbers(count), TrainingOrder(count, seed, rank, world_size), batch_size, num_workers)


def batches(loader, epochs=1):
    """Items of each batch."""
    return [labels.tolist() for _ in range(epochs) for _, labels in loader]


def test_an_epoch_shows_whole_batches_of_different_images():
    seen = batches(loader())
    assert [len(batch) for batch in seen] == [4] * 5
    assert len({item % 23 for batch in seen for item in batch}) == 20


def test_every_epoch_has_an_order_of_its_own_and_says_which_it_is():
    seen = batches(loader(), 3)
    assert [{item // 23 for batch in seen[5 * e : 5 * e + 5] for item in batch} for e in range(3)] == [{0}, {1}, {2}]
    orders = [[item % 23 for batch in seen[5 * e : 5 * e + 5] for item in batch] for e in range(3)]
    assert all(first != second for first, second in pairwise(orders))


def test_the_order_is_a_function_of_the_seed():
    torch.manual_seed(1)
    first = batches(loader(seed=3))
    torch.manual_seed(2)
    assert batches(loader(seed=3)) == first
    assert batches(loader(seed=4)) != first


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 4, 5, 7, 10])
def test_a_loader_goes_on_where_another_stopped(done, num_workers):
    whole, first, second = batches(loader(), 3), loader(num_workers=num_workers), loader(num_workers=num_workers)
    endless = (labels.tolist() for _ in range(3) for _, labels in first)
    assert [next(endless) for _ in range(done)] == whole[:done]
    second.load_state_dict(first.state_dict())
    assert batches(second, 3)[: 15 - done] == whole[done:]


def test_asking_twice_for_an_iterator_loses_nothing():
    both = loader()
    iter(both)
    assert batches(both) == batches(loader())


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_images_of_one_process_batch_by_batch(world_size):
    alone = batches(loader(count=24, batch_size=4), 2)
    ranks = [
        batches(loader(count=24, batch_size=4 // world_size, rank=r, world_size=world_size), 2)
        for r in range(world_size)
    ]
    together = [sorted(item for rank in ranks for item in rank[step]) for step in range(len(alone))]
    assert together == [sorted(batch) for batch in alone]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 5), (5, 2)])
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_whole_epochs_stay_whole_when_the_number_of_ranks_changes(before, after, epochs):
    first, second = loader(batch_size=2, world_size=before), loader(batch_size=2, world_size=after)
    batches(first, epochs)
    second.load_state_dict(first.state_dict())
    assert {item // 23 for batch in batches(second) for item in batch} == {epochs}
    assert first.state_dict() == {"images": 23 * epochs}


def test_a_rest_that_is_smaller_than_the_new_batches_is_left_out():
    first, second = loader(batch_size=2), loader(batch_size=6)
    list(zip(range(9), first, strict=False))
    second.load_state_dict(first.state_dict())
    assert {item // 23 for batch in batches(second) for item in batch} == {1}


def test_all_ranks_have_the_same_number_of_batches():
    assert len({len(batches(loader(count=23, batch_size=1, rank=r, world_size=5))) for r in range(5)}) == 1


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(UserError, match=r"at most 3, .* got 4"):
        training_loader(Numbers(3), 4, 0, 0, None)
