import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from sagl.data.npz import NpzData, NpzImageSource
from sagl.errors import UserError
from tests.helpers.files import NPZ_IMAGES, NPZ_LABELS, write_npz
from tests.helpers.training import IGNORED_WARNINGS

pytestmark = IGNORED_WARNINGS
SAVE_FUNCTIONS = [np.savez, np.savez_compressed]


@pytest.mark.parametrize("save", SAVE_FUNCTIONS)
@pytest.mark.parametrize("images", [NPZ_IMAGES, NPZ_IMAGES[..., :1], np.asfortranarray(NPZ_IMAGES)])
def test_images_and_labels_are_those_of_the_arrays(save, images, tmp_path):
    source = NpzImageSource(write_npz(tmp_path / "a.npz", images, save=save))
    assert (len(source), source.num_classes, source.label(5)) == (10, 4, 1)
    for index, pixels in enumerate(images):
        for image in (source.image(index), Image.open(io.BytesIO(source.read_bytes(index)))):
            assert np.array_equal(np.array(image).reshape(pixels.shape), pixels)
        assert np.array_equal(source.pixels(index, 3), np.broadcast_to(pixels, (12, 9, 3)))


def test_uncompressed_images_are_memory_mapped_and_compressed_ones_are_read_once(tmp_path):
    assert isinstance(NpzImageSource(write_npz(tmp_path / "a.npz")).images, np.memmap)
    compressed = NpzImageSource(write_npz(tmp_path / "b.npz", save=np.savez_compressed))
    assert compressed.images is compressed.images


@pytest.mark.parametrize("save", SAVE_FUNCTIONS)
def test_a_pickled_source_holds_the_path_rather_than_the_images(save, tmp_path):
    source = NpzImageSource(write_npz(tmp_path / "a.npz", np.zeros((1000, 32, 32, 3), dtype=np.uint8), None, save))
    pickled = pickle.dumps(source)
    assert len(pickled) < 20_000
    assert pickle.loads(pickled).read_bytes(3) == source.read_bytes(3)


@pytest.mark.parametrize("labels", [None, np.full(10, -1)])
def test_without_labels_there_are_no_classes(labels, tmp_path):
    source = NpzImageSource(write_npz(tmp_path / "a.npz", labels=labels))
    assert (source.num_classes, source.label(0)) == (None, -1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": NPZ_LABELS}, "arr_0"),
        ({"arr_0": NPZ_IMAGES.astype(np.float32)}, r"arr_0 .*float32 \(10, 12, 9, 3\)"),
        ({"arr_0": NPZ_IMAGES[:0]}, r"arr_0 .*uint8 \(0, 12, 9, 3\)"),
        ({"arr_0": NPZ_IMAGES.transpose(0, 3, 1, 2)}, r"arr_0 .*uint8 \(10, 3, 12, 9\)"),
        ({"arr_0": NPZ_IMAGES, "arr_1": NPZ_LABELS[:3]}, r"10 .*arr_1.* int64 \(3,\)"),
        ({"arr_0": NPZ_IMAGES, "arr_1": NPZ_LABELS / 2}, r"arr_1.* float64 \(10,\)"),
        ({"arr_0": NPZ_IMAGES, "arr_1": NPZ_LABELS - 1}, "arr_1.* 3 of 10 .*-1"),
        ({"arr_0": np.array([None, {}], dtype=object)}, "a.npz"),
    ],
)
def test_arrays_that_are_not_images_or_labels_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=f"`data.file`.*{message}"):
        NpzImageSource(tmp_path / "a.npz")


@pytest.mark.parametrize("save", SAVE_FUNCTIONS)
def test_a_truncated_or_missing_file_is_refused(save, tmp_path):
    data = write_npz(tmp_path / "a.npz", save=save).read_bytes()
    (tmp_path / "truncated.npz").write_bytes(data[: len(data) // 2])
    for name in ("truncated.npz", "missing.npz"):
        with pytest.raises(UserError, match=f"`data.file`.*{name}"):
            NpzImageSource(tmp_path / name)


def test_the_data_module_gives_labelled_batches(tmp_path):
    file = write_npz(tmp_path / "a.npz")
    module = NpzData(file=str(file), batch_size=4, num_workers=0, num_validation=2, image_size=8)
    module.setup("fit")
    batches = list(module.train_dataloader()) + list(module.val_dataloader())
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == sorted(NPZ_LABELS.tolist())
