from itertools import pairwise

import pytest
import torch
from torch.utils.data import SequentialSampler

from sagl.data.dataloader import (
    CorruptImageLog,
    Images,
    Loader,
    LoaderSettings,
    ResumableDataLoader,
    TrainingOrder,
    training_loader,
)
from sagl.errors import UserError
from tests.helpers.tiny import QUIET

pytestmark = QUIET


class MetricResults(Images):
    """Image i is a pixel of value i; the label is the item asked for, epoch and all."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        return torch.full((1, 1, 1), item % self.count), torch.tensor(item)


def loader(count=23, batch_size=4, seed=0, rank=0, world_size=1, num_workers=0, start_method=None, shape=None):
    reading = LoaderSettings(batch_size=batch_size, num_workers=num_workers, start_method=start_method, shape=shape)
    return ResumableDataLoader(MetricResults(count), TrainingOrder(count, seed, rank, world_size), reading)


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


@pytest.mark.parametrize(("num_workers", "shape"), [(0, None), (2, None), (2, (1, 1, 1))])
@pytest.mark.parametrize("done", [0, 1, 4, 5, 7, 10])
def test_a_loader_goes_on_where_another_stopped(done, num_workers, shape):
    whole = batches(loader(), 3)
    first, second = (loader(num_workers=num_workers, shape=shape) for _ in range(2))
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
        training_loader(MetricResults(3), LoaderSettings(batch_size=4), 0, None)


@pytest.mark.parametrize("shape", [None, (1, 1, 1)])
@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_workers_of_every_start_method_bring_the_same_batches(start_method, shape):
    assert batches(loader(num_workers=2, start_method=start_method, shape=shape), 2) == batches(loader(), 2)


# ------------------------------------------------------------------------------------------------------ damaged


class Holed(MetricResults):
    """Every fifth is damaged, and the next stands in for it."""

    def __getitem__(self, item):
        place = item % self.count
        whole = place + (place % 5 == 0)
        return torch.full((1, 1, 1), whole), torch.tensor(whole), torch.tensor(place if place % 5 == 0 else -1)


def holed(damaged, num_workers=0):
    reading = LoaderSettings(batch_size=4, num_workers=num_workers, damaged=damaged, name="picture {}".format)
    return Loader(Holed(12), SequentialSampler(range(12)), reading)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_pictures_are_counted_once_and_named_in_the_report(tmp_path, num_workers):
    report = tmp_path / "run" / "damaged.txt"
    seen = holed(CorruptImageLog(report, 3), num_workers)
    for _ in range(2):
        assert batches(seen)[0] == [1, 1, 2, 3]
    assert report.read_text().splitlines() == ["picture 0", "picture 5", "picture 10"]


def test_too_many_damaged_pictures_end_the_run_and_say_where_they_are_named(tmp_path):
    report = tmp_path / "damaged.txt"
    with pytest.raises(UserError, match=rf"`data.max_corrupt_fraction` allows 1 pictures .* see {report}\."):
        batches(holed(CorruptImageLog(report, 1)))
    assert report.read_text().splitlines() == ["picture 0", "picture 5"]
    with pytest.raises(UserError, match="the last of them picture 5"):
        batches(holed(CorruptImageLog(None, 1)))


def test_a_run_that_goes_on_knows_those_of_before(tmp_path):
    report = tmp_path / "damaged.txt"
    report.write_text("picture 0\npicture 77\n")
    with pytest.raises(UserError):
        batches(holed(CorruptImageLog(report, 3)))
    assert report.read_text().splitlines() == ["picture 0", "picture 77", "picture 5", "picture 10"]


def test_images_are_pairs_when_they_are_looked_at_one_by_one():
    assert [int(label) for _, label in Holed(7)] == [1, 1, 2, 3, 4, 6, 6]
