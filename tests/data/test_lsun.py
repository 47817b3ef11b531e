import io
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.lsun import LSUNClass

from sagl.data.dataloader import ImageLoader, LoaderSettings
from sagl.data.image_data import ImageDataset
from sagl.data.lsun import LSUNData, LSUNImageSource, find_lsun_folder
from sagl.data.transforms import CropResize
from sagl.errors import UserError
from tests.helpers.files import LSUN_COUNT, START_METHODS, contents, encode, ramp, write_lsun


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torchvision leaves a file open
@pytest.mark.parametrize("kind", ["WEBP", "JPEG"])
def test_images_are_those_that_torchvision_reads_in_the_same_order(kind, tmp_path, monkeypatch):
    folder = write_lsun(tmp_path / "cat", kind)
    shutil.copytree(folder, tmp_path / "copy")  # because a process opens a database once
    monkeypatch.chdir(tmp_path)  # where torchvision writes the keys
    source, expected = LSUNImageSource(folder), LSUNClass(str(tmp_path / "copy"))
    assert len(source) == len(expected) == LSUN_COUNT
    for i, (image, _) in enumerate(expected):
        ours = Image.open(io.BytesIO(source.read_bytes(i))).convert("RGB")
        assert np.array_equal(np.array(ours), np.array(image))


def test_the_source_is_a_torchvision_data_set_too(tmp_path):
    source = LSUNImageSource(write_lsun(tmp_path / "cat"))
    assert isinstance(source, LSUNClass)
    assert source[3][0].size == (20, 16)


def test_keys_are_listed_once_as_plain_data_in_the_cache_and_nowhere_else(tmp_path, cache, monkeypatch):
    folder = write_lsun(tmp_path / "cat")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    before = contents(folder)
    LSUNImageSource(folder)
    assert list((tmp_path / "cwd").iterdir()) == []
    assert contents(folder) == before
    (index,) = (cache / "lsun").iterdir()
    keys = np.load(index, allow_pickle=False)
    assert keys.tolist() == [f"{i:040x}".encode() for i in range(LSUN_COUNT)]
    np.save(index, keys[:4])
    assert len(LSUNImageSource(folder)) == 4  # the cached index was read
    os.utime(folder / "data.mdb", ns=(1, 1))
    assert len(LSUNImageSource(folder)) == LSUN_COUNT  # the database has changed


@pytest.mark.parametrize("method", START_METHODS)
def test_workers_of_every_start_method_read_the_database(method, tmp_path):
    source = LSUNImageSource(write_lsun(tmp_path / "cat", "JPEG"))
    source.read_bytes(0)  # the parent process has it open
    images = ImageDataset(source, np.arange(LSUN_COUNT), CropResize(image_size=8, channels=3))
    settings = LoaderSettings(batch_size=3, num_workers=2, start_method=method)
    batches = torch.cat([batch for batch, _ in ImageLoader(images, range(LSUN_COUNT), settings)])
    assert torch.equal(batches, torch.stack([image for image, _ in images]))


def test_corrupt_entries_are_replaced_named_and_counted(tmp_path):
    write_lsun(tmp_path / "cat", "JPEG", {2: encode(ramp(20, 16), "JPEG")[:200], 7: b""})
    data = LSUNData(category="cat", root=str(tmp_path), batch_size=2, num_validation=0, num_workers=0, image_size=8)
    data.max_corrupt_fraction = 0.2
    data.setup("fit")
    assert sum(len(images) for images, _ in data.train_dataloader()) == LSUN_COUNT
    assert data.corrupt_log.names == {f"{key:040x} in {tmp_path / 'cat'}" for key in (2, 7)}


@pytest.mark.parametrize("name", ["cat", "cat_lmdb", "cat_train_lmdb"])
def test_a_category_is_found_under_each_name_of_its_archive(name, tmp_path):
    folder = write_lsun(tmp_path / name)
    assert find_lsun_folder(tmp_path, "cat") == folder
    assert find_lsun_folder(folder, "cat") == folder


def test_a_missing_or_corrupt_database_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"`data.root`.*horse.*horse_train_lmdb"):
        find_lsun_folder(tmp_path, "horse")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(UserError, match=r"`data.root`.*cat"):
        LSUNImageSource(tmp_path / "cat")
