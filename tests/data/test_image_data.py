import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sagl.data.image_data import NO_LABEL, Cut, ImageDataModule, Pictures, Source, decoded, shrunk
from sagl.errors import UserError
from sagl.settings.network import UNetSettings
from tests.helpers.tiny import COLOUR, GREY, QUIET

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
    image, label, _ = pictures(ramp(*size))[0]
    assert (image.shape, image.dtype, int(label)) == ((3, 8, 8), torch.uint8, NO_LABEL)


def test_a_square_of_the_right_size_is_left_as_it_is():
    source = ramp(8, 8)
    assert torch.equal(pictures(source)[0][0].permute(1, 2, 0), torch.from_numpy(np.array(source)))


def test_the_cut_is_from_the_centre():
    image, *_ = pictures(ramp(20, 8))[0]
    assert image[0, 0].tolist() == list(range(6, 14))
    image, *_ = pictures(ramp(8, 20))[0]
    assert image[1, :, 0].tolist() == list(range(6, 14))


def test_large_pictures_are_halved_by_means_before_they_are_interpolated():
    source = ramp(64, 40)
    halved = source.resize((32, 20), Image.Resampling.BOX).resize((16, 10), Image.Resampling.BOX)
    expected = halved.resize((13, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(shrunk(torch.from_numpy(np.array(source)), 8).numpy(), np.array(expected))


def test_grey_networks_see_grey_pictures():
    image, *_ = pictures(ramp(8, 8), channels=1)[0]
    assert image.shape == (1, 8, 8)
    assert torch.equal(image[0], torch.from_numpy(np.array(ramp(8, 8).convert("L"))))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_pictures_of_other_modes_are_seen_as_rgb(mode):
    file = io.BytesIO()
    (Image.new(mode, (9, 12)) if mode != "I;16" else Image.new("I;16", (9, 12))).save(file, "TIFF")
    images = Pictures(Memory([file.getvalue()]), np.arange(1), Cut(side=8, channels=3))
    assert images[0][0].shape == (3, 8, 8)


@pytest.mark.parametrize(("mode", "subsampling"), [("RGB", 0), ("RGB", 2), ("L", 0), ("CMYK", 0)])
def test_jpegs_have_the_pixels_that_pillow_reads(mode, subsampling):
    noise = np.random.default_rng(0).integers(0, 256, (37, 50, 4), dtype=np.uint8)
    picture, file = Image.fromarray(noise[:, :, :3]).resize((90, 70)).convert(mode), io.BytesIO()
    picture.save(file, "JPEG", quality=80, subsampling=subsampling)
    with_pillow = np.array(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    assert np.array_equal(decoded(file.getvalue(), 3).numpy(), with_pillow)


def test_without_torchvisions_decoder_pillow_reads_jpegs_too(monkeypatch):
    file = io.BytesIO()
    ramp(90, 70).save(file, "JPEG")
    quick = decoded(file.getvalue(), 3)
    monkeypatch.setattr("sagl.data.image_data.RGB", None)
    assert torch.equal(decoded(file.getvalue(), 3), quick)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_jpeg_that_is_cut_off_is_damaged_and_not_grey_from_there_on(share):
    file = io.BytesIO()
    ramp(90, 70).save(file, "JPEG")
    with pytest.raises(OSError, match=r"(?i)truncated"):
        decoded(file.getvalue()[: int(share * len(file.getvalue()))], 3)


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


class MemoryData(ImageDataModule):
    """Twelve pictures of one grey value each."""

    classes = None

    def source(self):
        return Memory([png_bytes(Image.new("RGB", (9, 10), (i, i, i))) for i in range(12)], self.classes)


class OfNetwork:
    """What a trainer shows of itself."""

    global_rank, world_size, num_devices, state = 0, 1, 1, SimpleNamespace(fn="validate")

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
    with pytest.raises(UserError, match=r"`data.num_validation` must (leave|be at least 0)"):
        ready(num_validation=count)


def test_a_size_is_needed_where_there_is_no_network():
    with pytest.raises(UserError, match=r"`data.image_size` must be given"):
        ready(image_size=None).train_dataloader()


@pytest.mark.parametrize("kept", [0, 10, 40, 0.5])
def test_in_the_stead_of_a_damaged_picture_stands_the_next_whole_one_and_that_is_said(kept):
    whole = [png_bytes(ramp(8 + i, 9)) for i in range(4)]
    bytes_kept = int(kept * len(whole[1])) if kept < 1 else kept
    damaged = [whole[0], whole[1][:bytes_kept], b"no picture", whole[3]]
    images, unhurt = (Pictures(Memory(p, 4), np.arange(4), Cut(side=8, channels=3)) for p in (damaged, whole))
    assert [int(images[i][2]) for i in range(4)] == [-1, 1, 2, -1]
    for item in (1, 2, 1 + 4):
        assert torch.equal(images[item][0], unhurt[3][0])
        assert int(images[item][1]) == 3
    assert torch.equal(images[3][0], unhurt[3][0])


def test_the_last_picture_s_stead_is_taken_by_the_first():
    images = Pictures(Memory([png_bytes(ramp(8, 9)), b""], 2), np.arange(2), Cut(side=8, channels=3))
    assert [int(part) for part in images[1][1:]] == [0, 1]


def test_where_no_picture_is_whole_the_data_are_refused():
    with pytest.raises(UserError, match="not one of 3 is"):
        Pictures(Memory([b""] * 3), np.arange(3), Cut(side=8, channels=3))[0]


class DamagedData(MemoryData):
    """Twelve pictures, of which two are damaged."""

    def source(self):
        source = super().source()
        source.pictures[3] = source.pictures[8] = b"no picture"
        return source


def seen_by(max_corrupt_fraction):
    module = DamagedData(
        batch_size=2, num_workers=0, num_validation=4, image_size=8, max_corrupt_fraction=max_corrupt_fraction
    )
    module.setup("fit")
    return len(values(module.train_dataloader())) + len(values(module.val_dataloader()))


def test_damaged_pictures_of_training_and_validation_count_together():
    assert seen_by(2 / 12) == 12
    with pytest.raises(UserError, match=r"`data.max_corrupt_fraction` allows 1 pictures"):
        seen_by(0.01)  # of twelve, rounded up


def test_test_pictures_are_neither_trained_on_nor_validated():
    module = ready(num_test=3)
    train, val, test = (
        values(loader()) for loader in (module.train_dataloader, module.val_dataloader, module.test_dataloader)
    )
    assert (len(val), len(test)) == (4, 3)
    assert len({*train, *val, *test}) == len(train) + 7
    with pytest.raises(UserError, match=r"`data.num_test` must be at least 1"):
        ready().test_dataloader()


@pytest.mark.parametrize(
    "options", [{"num_test": -1}, {"num_test": 8}, {"max_corrupt_fraction": 1.5}, {"max_corrupt_fraction": -0.1}]
)
def test_shares_and_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(UserError, match=rf"`data\.({next(iter(options))}|num_validation)`"):
        ready(**options)


def test_without_a_number_there_are_as_many_workers_as_cores_and_at_most_eight(monkeypatch):
    for cores, workers in ((1, 1), (6, 6), (64, 8)):
        monkeypatch.setattr("sagl.data.image_data.available_cpus", lambda cores=cores: cores)
        assert ready(num_workers=None)._reading().num_workers == workers
