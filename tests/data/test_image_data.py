from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sagl.data.image_data import MAX_UNREADABLE, ImageDataModule, ImageDataset
from sagl.data.transforms import CropResize
from sagl.errors import UserError
from sagl.modules.classifier_module import ClassifierModule
from sagl.settings.network import ClassifierSettings, UNetSettings
from sagl.settings.training import ClassifierTrainingSettings
from tests.helpers.errors import refused
from tests.helpers.files import MemorySource, encode, grey, ramp
from tests.helpers.networks import COLOUR, GREY, GREY_CLASSIFIER


def dataset(*files, num_classes=None, **options):
    crop = CropResize(image_size=8, channels=3, **options)
    return ImageDataset(MemorySource(files, num_classes), np.arange(len(files)), crop)


def test_items_of_an_image_differ_by_epoch_and_are_reproducible():
    images = dataset(encode(ramp(8, 16)), encode(ramp(8, 16)), random_crop=True)
    epochs = [images[2 * epoch].image for epoch in range(100)]
    assert len({image.numpy().tobytes() for image in epochs}) > 10
    assert all(torch.equal(images[2 * epoch].image, image) for epoch, image in enumerate(epochs))


@pytest.mark.parametrize("fraction", [0, 0.2, 0.5])
def test_the_next_readable_image_replaces_a_corrupt_one(fraction):
    files = [encode(ramp(8 + i, 9)) for i in range(4)]
    corrupt = [files[0], files[1][: int(fraction * len(files[1]))], b"not an image", files[3]]
    images, expected = dataset(*corrupt, num_classes=4), dataset(*files)[3].image
    assert [images[i].corrupt for i in range(4)] == ["", "image 1", "image 2", ""]
    for item in (1, 2, 3, 1 + 4):
        assert torch.equal(images[item].image, expected)
        assert images[item].label == 3
    assert dataset(grey(1), b"", num_classes=2)[1][1:] == (0, "image 1")  # the first one follows the last


def test_a_batch_names_its_corrupt_images():
    images = torch.empty(3, 8, 8, 3, dtype=torch.uint8)
    labels, corrupt = dataset(grey(1), b"", grey(3), num_classes=3).read_batch([0, 1, 5], images)
    assert (labels, corrupt) == ([0, 2, 2], ["image 1"])
    assert torch.equal(images[1], images[2])


def test_a_data_set_without_readable_images_is_refused():
    with pytest.raises(UserError, match=r"`data`.* 3"):
        dataset(b"", b"", b"")[0]


class LostSource(MemorySource):
    """Images whose folder has disappeared."""

    num_read = 0

    def read_bytes(self, index):
        self.num_read += 1
        raise FileNotFoundError(f"read {self.num_read}")


def test_a_data_set_that_has_disappeared_is_refused_after_a_number_of_images():
    source = LostSource([b""] * 1000)
    images = ImageDataset(source, np.arange(1000), CropResize(image_size=8, channels=3))
    with refused("`data`", MAX_UNREADABLE, "FileNotFoundError: read 1."):
        images[990]
    assert source.num_read == MAX_UNREADABLE < 1000


class MemoryData(ImageDataModule):
    """Twelve images of one grey value each."""

    num_classes, corrupt = None, ()

    def source(self):
        files = [b"not an image" if i in self.corrupt else grey(i, size=(9, 10)) for i in range(12)]
        return MemorySource(files, self.num_classes)


class FakeTrainer:
    """The attributes of a trainer that a data module reads."""

    num_devices, state, accumulate_grad_batches = 1, SimpleNamespace(fn="validate"), 1

    def __init__(self, network, rank=0, world_size=1):
        settings = UNetSettings(**network) if isinstance(network, dict) else network
        self.lightning_module = SimpleNamespace(network_settings=settings)
        self.global_rank, self.world_size = rank, world_size


def data_module(trainer=None, num_classes=None, corrupt=(), **options):
    module = MemoryData(**{"batch_size": 2, "num_workers": 0, "num_validation": 4, "image_size": 8, **options})
    module.num_classes, module.corrupt, module.trainer = num_classes, corrupt, trainer
    module.setup("fit")
    return module


def values(loader):
    return [int(image.float().mean()) for images, _ in loader for image in images]


def test_the_splits_are_disjoint_and_do_not_depend_on_the_seed():
    splits = []
    for seed in (0, 1):
        module = data_module(seed=seed, num_test=2)
        train, val, test = values(module.train_dataloader()), values(module.val_dataloader()), module.test_dataloader()
        assert sorted(train + val + values(test)) == list(range(12))
        splits.append((val, values(test)))
    assert splits[0] == splits[1]
    with pytest.raises(UserError, match=r"`data.num_test`.* 0"):
        data_module().test_dataloader()


@pytest.mark.parametrize(("split", "name"), [("val", "num_validation"), ("test", "num_test")])
def test_fewer_images_than_processes_are_refused_on_every_rank(split, name):
    network = {**GREY, "num_classes": None, "null_label": False}
    for rank in range(4):
        module = data_module(FakeTrainer(network, rank, world_size=4), **{name: 3})
        with refused(f"`data.{name}`", "3", "4"):
            getattr(module, f"{split}_dataloader")()
    trainer = FakeTrainer(network, world_size=4)
    assert len(data_module(trainer, num_validation=0).val_dataloader()) == 0
    assert len(data_module(trainer, num_validation=4).val_dataloader()) == 1


def test_size_and_channels_are_those_of_the_network():
    module = data_module(FakeTrainer({**GREY, "num_classes": None, "null_label": False}), image_size=None)
    assert next(iter(module.train_dataloader()))[0].shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match=r"`data.image_size`"):
        data_module(image_size=None).train_dataloader()


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_another_size_than_that_of_the_network_is_refused(loader):
    module = data_module(FakeTrainer({**GREY, "num_classes": None, "null_label": False}), image_size=16)
    with refused("`data.image_size`", "8", "16"):
        getattr(module, loader)()


def test_images_are_read_as_greyscale_or_rgb_alone():
    module = data_module(FakeTrainer({**GREY, "in_channels": 2, "num_classes": None, "null_label": False}))
    with pytest.raises(UserError, match=r"in_channels 2"):
        module.train_dataloader()


def test_a_classifier_in_training_determines_size_and_channels_and_needs_labels_of_its_classes():
    settings = ClassifierSettings(**{**GREY_CLASSIFIER, "num_classes": 3})
    trainer = FakeTrainer(ClassifierModule(ClassifierTrainingSettings(classifier=settings)).network_settings)
    size = settings.image_size
    shape = next(iter(data_module(trainer, settings.num_classes, image_size=None).train_dataloader()))[0].shape
    assert shape == (2, settings.in_channels, size, size)
    for num_classes in (None, settings.num_classes + 1):
        with pytest.raises(UserError, match=rf"`data`.* {settings.num_classes} classes"):
            data_module(trainer, num_classes)


@pytest.mark.parametrize(
    ("network", "num_classes", "message"),
    [
        ({"num_classes": 3, "null_label": False}, None, "labels.* 3 classes"),
        ({"num_classes": 3, "null_label": True}, 4, "3 classes.* 4"),
    ],
)
def test_labels_that_do_not_fit_the_network_are_refused(network, num_classes, message):
    with pytest.raises(UserError, match=message):
        data_module(FakeTrainer({**COLOUR, **network}), num_classes)


@pytest.mark.parametrize("network", [{"num_classes": None, "null_label": False}, {"num_classes": 3}])
def test_images_without_labels_fit_networks_that_need_none(network):
    assert data_module(FakeTrainer({**COLOUR, **network}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_validation", count) for count in (12, 100, -1)),
        *(("num_test", count) for count in (8, -1)),
        *(("max_corrupt_fraction", fraction) for fraction in (1.5, -0.1)),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=rf"`data\.{name}`.*{value}"):
        data_module(**{name: value})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_if_no_image_is_readable_the_message_is_one_line_with_the_first_error(num_workers):
    module = data_module(corrupt=range(12), num_workers=num_workers)
    with pytest.raises(UserError) as error:
        next(iter(module.train_dataloader()))
    message = str(error.value)
    assert message.startswith("`data` must contain readable images, and none of 8 images in a row is readable.")
    assert "UnidentifiedImageError" in message
    assert len(message.splitlines()) == 1


def test_corrupt_images_of_training_and_validation_count_together():
    def num_read(**options):
        module = data_module(corrupt=(3, 8), **options)
        return len(values(module.train_dataloader())) + len(values(module.val_dataloader()))

    assert num_read(max_corrupt_fraction=2 / 12) == 12
    with pytest.raises(UserError, match=r"`data.max_corrupt_fraction`.* 1 "):
        num_read(max_corrupt_fraction=0.01)  # of twelve images, rounded up


def test_the_limit_on_corrupt_images_does_not_depend_on_the_number_of_processes():
    """Every process meets every corrupt image in time, as each epoch is shuffled anew."""
    trainer = FakeTrainer({**COLOUR, "num_classes": None, "null_label": False}, world_size=8)
    assert data_module(trainer, image_size=None, max_corrupt_fraction=0.5).corrupt_log.max_images == 6


def test_the_default_number_of_workers_is_the_number_of_cores_and_at_most_eight(monkeypatch):
    for cores, workers in ((1, 1), (6, 6), (64, 8)):
        monkeypatch.setattr("sagl.utils.environment.available_cpus", lambda cores=cores: cores)
        assert data_module(num_workers=None)._loader_settings.num_workers == workers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 10**400),
        ("num_workers", -1),
        ("image_size", -1),
        ("image_size", 10**9),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_a_setting_out_of_range_is_refused_before_memory_is_allocated(name, value):
    with refused(f"`data.{name}`", str(value)[:20]):
        data_module(**{name: value})
