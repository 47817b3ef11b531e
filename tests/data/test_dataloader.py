from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from sagl.data.dataloader import (
    NUM_PREFETCHED,
    CorruptImageLog,
    EpochDataset,
    ImageLoader,
    Item,
    LoaderSettings,
    ResumableDataLoader,
    ResumableDistributedSampler,
    SharedMemoryBatches,
    SlotBatchSampler,
    training_loader,
)
from sagl.errors import UserError
from tests.helpers.errors import refused
from tests.helpers.files import START_METHODS


class Ramps(EpochDataset):
    """Image i holds i in its first channel and x in the second; the label is the item, epoch included."""

    image_shape = (4, 5, 2)

    def __init__(self, num_images):
        self.num_images = num_images

    def __len__(self):
        return self.num_images

    def __getitem__(self, item):
        x = torch.arange(5, dtype=torch.uint8).expand(4, 5)
        index = torch.full((4, 5), item % self.num_images, dtype=torch.uint8)
        return Item(torch.stack([index, x]), item)


def loader(num_images=23, batch_size=4, seed=0, rank=0, world_size=1, num_workers=0, start_method=None, accumulated=1):
    settings = LoaderSettings(batch_size=batch_size, num_workers=num_workers, start_method=start_method)
    step_size = batch_size * accumulated
    sampler = ResumableDistributedSampler(num_images, seed, rank, world_size, step_size=step_size)
    return ResumableDataLoader(Ramps(num_images), sampler, settings)


def eval_loader(num_images=50, num_workers=2):
    return ImageLoader(Ramps(num_images), range(num_images), LoaderSettings(batch_size=3, num_workers=num_workers))


def items(loader, epochs=1):
    """Return the items of each batch."""
    return [labels.tolist() for _ in range(epochs) for _, labels in loader]


def test_an_epoch_has_whole_batches_of_distinct_images():
    batches = items(loader())
    assert [len(batch) for batch in batches] == [4] * 5
    assert len({item % 23 for batch in batches for item in batch}) == 20


def test_every_epoch_has_its_own_order_and_items_contain_the_epoch():
    batches = items(loader(), 3)
    epochs = [[item for batch in batches[5 * e : 5 * e + 5] for item in batch] for e in range(3)]
    assert [{item // 23 for item in epoch} for epoch in epochs] == [{0}, {1}, {2}]
    assert all([i % 23 for i in first] != [i % 23 for i in second] for first, second in pairwise(epochs))


def test_the_order_is_a_function_of_the_seed():
    torch.manual_seed(1)
    first = items(loader(seed=3))
    torch.manual_seed(2)
    assert items(loader(seed=3)) == first
    assert items(loader(seed=4)) != first


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [0, 4, 5, 7, 10])
def test_a_loader_continues_where_another_stopped(done, num_workers):
    expected = items(loader(), 3)
    first, second = (loader(num_workers=num_workers) for _ in range(2))
    stream = (labels.tolist() for _ in range(3) for _, labels in first)
    assert [next(stream) for _ in range(done)] == expected[:done]
    second.load_state_dict(first.state_dict())
    assert items(second, 3)[: 15 - done] == expected[done:]


def test_an_unused_iterator_does_not_change_the_position():
    resumable = loader()
    iter(resumable)
    assert items(resumable) == items(loader())


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_images_of_a_global_batch_do_not_depend_on_the_number_of_ranks(world_size):
    expected = items(loader(num_images=24, batch_size=4), 2)
    ranks = [
        items(loader(num_images=24, batch_size=4 // world_size, rank=rank, world_size=world_size), 2)
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {len(expected)}
    union = [sorted(item for rank in ranks for item in rank[step]) for step in range(len(expected))]
    assert union == [sorted(batch) for batch in expected]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 5), (5, 2)])
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_whole_epochs_stay_whole_when_the_number_of_ranks_changes(before, after, epochs):
    first, second = loader(batch_size=2, world_size=before), loader(batch_size=2, world_size=after)
    items(first, epochs)
    second.load_state_dict(first.state_dict())
    assert {item // 23 for batch in items(second) for item in batch} == {epochs}
    assert first.state_dict()["images"] == 23 * epochs


@pytest.mark.parametrize("num_batches", range(9))
def test_a_place_within_a_step_is_kept_if_its_size_has_not_changed(num_batches):
    first, second, older = (loader(batch_size=2, accumulated=4) for _ in range(3))
    list(zip(range(num_batches), first, strict=False))
    second.load_state_dict(first.state_dict())
    assert second.num_batches_of_epoch == num_batches % 8
    older.load_state_dict({"images": first.state_dict()["images"]})
    assert older.num_batches_of_epoch % 4 == 0


def test_a_remainder_smaller_than_the_new_batch_size_is_left_out():
    first, second = loader(batch_size=2), loader(batch_size=6)
    list(zip(range(9), first, strict=False))
    second.load_state_dict(first.state_dict())
    assert {item // 23 for batch in items(second) for item in batch} == {1}


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_ends_with_a_whole_optimiser_step(world_size):
    """23 images are two steps of 8; the other 7 would be a step with a smaller gradient."""
    batch_size, accumulated = 2, 4 // world_size
    ranks = [
        items(loader(batch_size=batch_size, rank=rank, world_size=world_size, accumulated=accumulated), 3)
        for rank in range(world_size)
    ]
    assert [len(batches) for batches in ranks] == [3 * 2 * accumulated] * world_size
    assert [item // 23 for item in ranks[0][2 * accumulated]] == [1] * batch_size


@pytest.mark.parametrize(("batch_size", "accumulated"), [(2, 4), (4, 2), (1, 8), (8, 1), (4, 1), (3, 2)])
def test_a_resumed_epoch_has_whole_steps_whatever_the_batch_size(batch_size, accumulated):
    """8 of the 23 images of the epoch are consumed."""
    first, second = loader(batch_size=4, accumulated=2), loader(batch_size=batch_size, accumulated=accumulated)
    list(zip(range(2), first, strict=False))
    second.load_state_dict(first.state_dict())
    assert second.num_batches_of_epoch % accumulated == 0
    rest = items(second)
    assert len(rest) % accumulated == 0
    assert second.num_batches_of_epoch == 0  # the next epoch
    step_size = batch_size * accumulated
    assert len(rest) == (23 // step_size * step_size - 8) // step_size * accumulated


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(UserError, match=r"`data.batch_size`.* 3.* 4"):
        training_loader(Ramps(3), LoaderSettings(batch_size=4), 0, None)


def test_too_few_images_for_an_optimiser_step_are_refused():
    trainer = SimpleNamespace(global_rank=0, world_size=2, accumulate_grad_batches=3)
    with refused("`global_batch_size`", "`trainer.accumulate_grad_batches`", "23 images", "24"):
        training_loader(Ramps(23), LoaderSettings(batch_size=4), 0, trainer)
    assert len(training_loader(Ramps(24), LoaderSettings(batch_size=4), 0, trainer)) == 3


@pytest.mark.parametrize("start_method", START_METHODS)
def test_workers_of_every_start_method_give_the_same_batches(start_method):
    assert items(loader(num_workers=2, start_method=start_method), 2) == items(loader(), 2)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_keep_their_values_when_their_slot_is_written_again(num_workers):
    batches = list(eval_loader(num_workers=num_workers)) * 2
    for k, (images, labels) in enumerate(batches):
        first = 3 * (k % 17)
        assert labels.tolist() == list(range(first, min(first + 3, 50)))
        assert images.shape == (len(labels), 2, 4, 5)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images[:, 0].flatten(1).unique(dim=1).flatten().tolist() == labels.tolist()
        assert images[0, 1, 3].tolist() == [0, 1, 2, 3, 4]


def test_an_abandoned_epoch_does_not_affect_later_ones():
    images_and_labels = eval_loader()
    for _ in range(3):
        batches = iter(images_and_labels)
        for k in range(5):
            images, labels = next(batches)
            assert images[:, 0, 0, 0].tolist() == labels.tolist() == [3 * k, 3 * k + 1, 3 * k + 2]


def test_no_slot_is_reused_while_its_batch_may_be_in_flight():
    shared = SharedMemoryBatches(Ramps(50), batch_size=3, num_workers=2)
    slots = [slot for slot, *_ in SlotBatchSampler([[0]] * 20, len(shared.slots))]
    in_flight = 2 * NUM_PREFETCHED + 1
    assert all(len(set(slots[k : k + in_flight])) == in_flight for k in range(20 - in_flight))


class CorruptRamps(Ramps):
    """Every fifth image is corrupt and replaced by the next."""

    def __getitem__(self, item):
        corrupt = item % 5 == 0
        return Item(super().__getitem__(item).image, item + corrupt, f"image {item}" if corrupt else "")


def test_a_batch_holds_its_items_of_any_epoch_and_names_the_corrupt_ones():
    images, dataset = torch.zeros(4, 4, 5, 2, dtype=torch.uint8), CorruptRamps(12)
    assert dataset.read_batch([3, 5, 12, 25], images) == ([3, 6, 12, 26], ["image 5", "image 25"])
    for image, item in zip(images, [3, 5, 12, 25], strict=True):
        assert torch.equal(image, dataset[item].image.permute(1, 2, 0))


def corrupt_loader(log, num_workers=0):
    return ImageLoader(CorruptRamps(12), range(12), LoaderSettings(batch_size=4, num_workers=num_workers), log)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_images_are_counted_once_and_named_in_the_report(tmp_path, num_workers):
    report = tmp_path / "run" / "corrupt_images.txt"
    images = corrupt_loader(CorruptImageLog(report, 3), num_workers)
    for _ in range(2):
        assert items(images)[0] == [1, 1, 2, 3]
    assert report.read_text().splitlines() == ["image 0", "image 5", "image 10"]


def test_too_many_corrupt_images_are_refused_and_the_message_names_the_report(tmp_path):
    report = tmp_path / "corrupt_images.txt"
    with pytest.raises(UserError, match=rf"`data.max_corrupt_fraction`.* 1 .*image 5.*{report}"):
        items(corrupt_loader(CorruptImageLog(report, 1)))
    assert report.read_text().splitlines() == ["image 0", "image 5"]
    with pytest.raises(UserError, match="image 5"):
        items(corrupt_loader(CorruptImageLog(None, 1)))


def test_a_resumed_run_counts_the_corrupt_images_of_the_report(tmp_path):
    report = tmp_path / "corrupt_images.txt"
    report.write_text("image 0\nimage 77\n")
    with pytest.raises(UserError):
        items(corrupt_loader(CorruptImageLog(report, 3)))
    assert report.read_text().splitlines() == ["image 0", "image 77", "image 5", "image 10"]


def test_iterating_over_a_dataset_gives_one_epoch_of_pairs():
    assert [label for _, label in CorruptRamps(7)] == [1, 1, 2, 3, 4, 6, 6]


def test_workers_whose_shared_memory_does_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=64 << 10))
    loader(num_workers=0)
    with pytest.raises(UserError, match=r"`data\.num_workers`.*0\.1 MB.*--shm-size"):
        loader(num_workers=2)
