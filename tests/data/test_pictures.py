import io

import numpy as np
import pytest
import torch
from PIL import Image

from sagl.data.pictures import NO_LABEL, Cut, PictureData, Pictures, Source, shrunk
from sagl.settings.errors import UserError
from sagl.settings.network import UNetSettings
from tests.tiny import COLOUR, GREY, QUIET

pytestmark = QUIET


def png_bytes(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


class Memory(Source):
    """A source of encoded pictures held in memory."""

    def __init__(self, pictures, num_classes=None):
        self.pictures, self.num_classes = pictures, num_classes

    def __len__(self):
        return len(self.pictures)

    def encoded(self, index):
        return self.pictures[index]

    def label(self, index):
        return index % self.num_classes if self.num_classes else NO_LABEL

    def name(self, index):
        return f"picture {index}"


def ramp(width, height):
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def pictures(*images, **cut):
    cut = Cut(**{"side": 8, "channels": 3, **cut})
    return Pictures(Memory([png_bytes(image) for image in images]), np.arange(len(images)), cut)


# --------------------------------------------------------------------------------------------------------- cuts


@pytest.mark.parametrize("size", [(8, 8), (8, 30), (100, 64), (33, 17), (15, 16), (8, 9), (5, 7)])
def test_a_picture_of_any_size_becomes_a_square(size):
    image, label = pictures(ramp(*size))[0]
    assert (image.shape, image.dtype, int(label)) == ((3, 8, 8), torch.uint8, NO_LABEL)


def test_a_square_of_the_right_size_is_left_as_it_is():
    source = ramp(8, 8)
    assert torch.equal(pictures(source)[0][0].permute(1, 2, 0), torch.from_numpy(np.array(source)))


def test_the_cut_is_from_the_centre():
    image, _ = pictures(ramp(20, 8))[0]
    assert image[0, 0].tolist() == list(range(6, 14))
    image, _ = pictures(ramp(8, 20))[0]
    assert image[1, :, 0].tolist() == list(range(6, 14))


def test_large_pictures_are_halved_by_means_before_they_are_interpolated():
    source = ramp(64, 40)
    halved = source.resize((32, 20), Image.Resampling.BOX).resize((16, 10), Image.Resampling.BOX)
    expected = halved.resize((13, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(np.array(shrunk(source, 8)), np.array(expected))


def test_grey_networks_see_grey_pictures():
    image, _ = pictures(ramp(8, 8), channels=1)[0]
    assert image.shape == (1, 8, 8)
    assert torch.equal(image[0], torch.from_numpy(np.array(ramp(8, 8).convert("L"))))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_pictures_of_other_modes_are_seen_as_rgb(mode):
    file = io.BytesIO()
    (Image.new(mode, (9, 12)) if mode != "I;16" else Image.new("I;16", (9, 12))).save(file, "TIFF")
    images = Pictures(Memory([file.getvalue()]), np.arange(1), Cut(side=8, channels=3))
    assert images[0][0].shape == (3, 8, 8)


# ------------------------------------------------------------------------------------------------------- random


def test_nothing_is_random_unless_asked_for():
    images = pictures(ramp(20, 30))
    assert all(torch.equal(images[epoch][0], images[0][0]) for epoch in range(20))


def test_about_half_of_the_epochs_mirror_a_picture():
    images = pictures(ramp(8, 8), random_flip=True)
    plain = pictures(ramp(8, 8))[0][0]
    mirrored = [torch.equal(images[epoch][0], plain.flip(-1)) for epoch in range(200)]
    assert all(m or torch.equal(images[e][0], plain) for e, m in enumerate(mirrored))
    assert 70 < sum(mirrored) < 130


def test_random_cuts_differ_by_epoch_reach_the_edges_and_repeat():
    images = pictures(ramp(8, 16), random_crop=True)
    seen = [images[epoch][0] for epoch in range(100)]
    assert len({image.numpy().tobytes() for image in seen}) > 10
    assert min(int(image[1].min()) for image in seen) == 0
    assert max(int(image[1].max()) for image in seen) == 15
    assert all(torch.equal(images[epoch][0], image) for epoch, image in enumerate(seen))


# ------------------------------------------------------------------------------------------------------ modules


class MemoryData(PictureData):
    """Twelve pictures of one grey value each."""

    classes = None

    def source(self):
        return Memory([png_bytes(Image.new("RGB", (9, 10), (i, i, i))) for i in range(12)], self.classes)


class OfNetwork:
    """What a trainer shows of itself."""

    global_rank, world_size = 0, 1

    def __init__(self, settings):
        self.lightning_module = self
        self.network_settings = settings


def ready(trainer=None, classes=None, **options):
    module = MemoryData(**{"batch_size": 2, "num_workers": 0, "num_validation": 4, "image_size": 8, **options})
    module.classes, module.trainer = classes, trainer
    module.setup("fit")
    return module


def values(loader):
    return [int(image.float().mean()) for images, _ in loader for image in images]


def test_validation_pictures_are_not_trained_on_and_do_not_depend_on_the_seed():
    for seed in (0, 1):
        module = ready(seed=seed)
        train, held_out = values(module.train_dataloader()), values(module.val_dataloader())
        assert sorted(train + held_out) == list(range(12))
        assert held_out == values(ready().val_dataloader())


def test_size_and_channels_are_the_network_s():
    module = ready(OfNetwork(UNetSettings(**{**GREY, "num_classes": None, "null_label": False})), image_size=None)
    assert next(iter(module.train_dataloader()))[0].shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("network", "classes", "said"),
    [
        ({"num_classes": 3, "null_label": False}, None, "must have labels for a network of 3 classes"),
        ({"num_classes": 3, "null_label": True}, 4, "at most 3 classes, those of the network, got 4"),
    ],
)
def test_pictures_that_do_not_suit_the_network_are_refused(network, classes, said):
    with pytest.raises(UserError, match=said):
        ready(OfNetwork(UNetSettings(**{**COLOUR, **network})), classes)


@pytest.mark.parametrize("network", [{"num_classes": None, "null_label": False}, {"num_classes": 3}])
def test_pictures_without_labels_suit_networks_that_need_none(network):
    assert ready(OfNetwork(UNetSettings(**{**COLOUR, **network})))


@pytest.mark.parametrize("count", [12, 100, -1])
def test_validation_must_leave_pictures_to_train_on(count):
    with pytest.raises(UserError, match=r"`data.num_validation` must leave"):
        ready(num_validation=count)


def test_a_size_is_needed_where_there_is_no_network():
    with pytest.raises(UserError, match=r"`data.image_size` must be given"):
        ready(image_size=None).train_dataloader()


def test_a_damaged_picture_is_named():
    whole = png_bytes(ramp(40, 40))
    for damaged in (b"", b"no picture", whole[: len(whole) // 2]):
        images = Pictures(Memory([whole, damaged]), np.arange(2), Cut(side=8, channels=3))
        with pytest.raises(UserError, match="picture 1 is damaged"):
            images[1]
