from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sagl.data.dataloader import EpochDataset
from sagl.data.in_memory import InMemoryData, InMemoryImages
from sagl.errors import UserError
from sagl.settings.network import UNetSettings
from tests.helpers.errors import refused
from tests.helpers.networks import COLOUR

SIZE = COLOUR["image_size"]


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


class Ramps(InMemoryData):
    """Seven images of three channels and of classes 0 to 6."""

    folder = Path()

    def split(self, *, test):
        return InMemoryImages(torch.zeros(7, 3, SIZE, SIZE, dtype=torch.uint8), torch.arange(7))


def training_loader(**network):
    data = Ramps(batch_size=2)
    data.trainer = SimpleNamespace(
        global_rank=0,
        world_size=1,
        accumulate_grad_batches=1,
        lightning_module=SimpleNamespace(network_settings=UNetSettings(**{**COLOUR, "num_classes": 7, **network})),
    )
    return data.train_dataloader()


@pytest.mark.parametrize(("split", "num_validation"), [("val", 3), ("test", 4)])
def test_fewer_images_than_processes_are_refused(split, num_validation):
    data = Ramps(batch_size=2, num_validation=num_validation)
    data.trainer = SimpleNamespace(global_rank=0, world_size=4, lightning_module=None)
    with refused("`data.num_validation`", "3", "4"):
        getattr(data, f"{split}_dataloader")()


def test_more_validation_images_than_the_test_split_has_are_refused():
    data = Ramps(batch_size=2, num_validation=1000)
    with refused("`data.num_validation`", "1000"):
        data.val_dataloader()


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("num_workers", -1), ("seed", -1)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=rf"`data.{name}`.*{value}"):
        Ramps(**{name: value}).setup("fit")


def test_images_of_the_network_s_size_channels_and_classes_are_trained_on():
    assert len(training_loader()) == 3
    assert len(training_loader(num_classes=None, null_label=False)) == 3


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ({"image_size": 2 * SIZE, "attention_resolutions": (SIZE,)}, [f"{SIZE}x{SIZE}", f"image_size {2 * SIZE}"]),
        ({"in_channels": 1}, ["3 channels", "in_channels 1"]),
        ({"num_classes": 6}, ["6 classes", "7"]),
    ],
)
def test_images_that_do_not_fit_the_network_are_refused(network, names):
    with pytest.raises(UserError, match="`data`") as error:
        training_loader(**network)
    assert all(name in str(error.value) for name in names)
