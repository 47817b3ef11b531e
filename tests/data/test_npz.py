import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sagl.data.image_data import Cut, Pictures
from sagl.data.npz import NpzData, NpzImageSource
from sagl.errors import UserError
from tests.helpers.tiny import QUIET

pytestmark = QUIET

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 12, 9, 3), dtype=np.uint8)
LABELS = np.arange(10) % 4


def write_npz(path, images=IMAGES, labels=LABELS, save=np.savez):
    save(path, images, *([] if labels is None else [labels]))
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("images", [IMAGES, IMAGES[..., :1], np.asfortranarray(IMAGES)])
def test_pictures_are_the_arrays_stored_or_compressed(save, images, tmp_path):
    pictures = NpzImageSource(write_npz(tmp_path / "a.npz", images, save=save))
    assert (len(pictures), pictures.num_classes, pictures.label(5)) == (10, 4, 1)
    for index in range(10):
        for picture in (pictures.picture(index), Image.open(io.BytesIO(pictures.encoded(index)))):
            assert np.array_equal(np.array(picture).reshape(images[index].shape), images[index])


def test_stored_images_stay_on_the_disk_and_compressed_ones_are_read_once(tmp_path):
    stored = NpzImageSource(write_npz(tmp_path / "a.npz"))
    assert isinstance(stored.images, np.memmap)
    packed = NpzImageSource(write_npz(tmp_path / "b.npz", save=np.savez_compressed))
    assert packed.images is packed.images


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_another_process_gets_the_name_of_the_file_rather_than_its_images(save, tmp_path):
    images = np.zeros((1000, 32, 32, 3), dtype=np.uint8)
    pictures = NpzImageSource(write_npz(tmp_path / "a.npz", images, None, save))
    sent = pickle.dumps(pictures)
    assert len(sent) < 20_000
    assert pickle.loads(sent).encoded(3) == pictures.encoded(3)


def test_spawned_workers_read_them(tmp_path):
    source = NpzImageSource(write_npz(tmp_path / "a.npz"))
    images = Pictures(source, np.arange(10), Cut(side=8, channels=3))
    loader = DataLoader(images, 5, num_workers=2, multiprocessing_context="spawn")
    seen = torch.cat([batch[0] for batch in loader])
    assert torch.equal(seen, torch.stack([images[i][0] for i in range(10)]))


@pytest.mark.parametrize("labels", [None, np.full(10, -1)])
def test_without_labels_there_are_no_classes(labels, tmp_path):
    pictures = NpzImageSource(write_npz(tmp_path / "a.npz", labels=labels))
    assert (pictures.num_classes, pictures.label(0)) == (None, -1)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"labels": LABELS}, "must hold images as arr_0"),
        ({"arr_0": IMAGES.astype(np.float32)}, r"arr_0 of .* is float32 \(10, 12, 9, 3\)"),
        ({"arr_0": IMAGES[:0]}, r"uint8 \(0, 12, 9, 3\)"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"uint8 \(10, 3, 12, 9\)"),
        ({"arr_0": IMAGES, "arr_1": LABELS[:3]}, r"must hold 10 whole numbers as arr_1.* int64 \(3,\)"),
        ({"arr_0": IMAGES, "arr_1": LABELS / 2}, r"float64 \(10,\)"),
        ({"arr_0": IMAGES, "arr_1": LABELS - 1}, "3 of 10 at -1, the lowest at -1"),
        ({"arr_0": np.array([None, {}], dtype=object)}, "damaged or none"),
    ],
)
def test_arrays_that_are_no_images_or_no_labels_are_refused_in_one_line(arrays, said, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=said) as error:
        NpzImageSource(tmp_path / "a.npz")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_half_a_file_and_no_file_are_refused(save, tmp_path):
    whole = write_npz(tmp_path / "a.npz", save=save).read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    for name, said in (("half.npz", "damaged or none"), ("absent.npz", "there is none at")):
        with pytest.raises(UserError, match=said):
            NpzImageSource(tmp_path / name)


def test_the_module_gives_labelled_batches(tmp_path):
    file = write_npz(tmp_path / "a.npz")
    module = NpzData(file=str(file), batch_size=4, num_workers=0, num_validation=2, image_size=8)
    module.setup("fit")
    seen = list(module.train_dataloader()) + list(module.val_dataloader())
    assert sorted(torch.cat([labels for _, labels in seen]).tolist()) == sorted(LABELS.tolist())
