import io
import os
import shutil

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.lsun import LSUNClass

from sagl.data.dataloader import ImageLoader, LoaderSettings
from sagl.data.image_data import ImageDataset
from sagl.data.lsun import LSUNData, LSUNImageSource, find_lsun_folder, is_lmdb
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


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_keys_are_listed_whether_or_not_python_buffers_its_output(unbuffered, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    assert len(LSUNImageSource(write_lsun(tmp_path / "cat", "JPEG"))) > 0


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
    assert keys.tolist() == [f"{i:040x}.".encode() for i in range(LSUN_COUNT)]
    monkeypatch.setattr("sagl.data.lsun._list_keys", lambda *_: pytest.fail("the cached keys are not read"))
    LSUNImageSource(folder)
    monkeypatch.undo()
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


def write_entries(path, entries, **options):
    """Write an LMDB with the given keys and values."""
    environment = lmdb.open(str(path), map_size=1 << 24, **options)
    with environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    environment.close()
    return path


def test_keys_of_any_bytes_are_read(tmp_path):
    keys = [b"\x00", b"\x00\x00", b"\x01\x00\x00\x00", b"a/b.jpg", b"caf\xc3\xa9", b"\xff\xfe"]
    source = LSUNImageSource(write_entries(tmp_path / "db", {key: b"image of " + key for key in keys}))
    assert [source.read_bytes(i) for i in range(len(source))] == [b"image of " + key for key in keys]
    assert source.name(5) == rf"\xff\xfe in {tmp_path / 'db'}"


def test_a_database_in_one_file_is_read_under_each_of_its_paths(tmp_path):
    file = write_entries(tmp_path / "cat.LMDB", {b"a": b"1", b"b": b"2"}, subdir=False)
    (tmp_path / "link.lmdb").symlink_to(file)
    for path in (file, tmp_path / "link.lmdb"):
        assert is_lmdb(path)
        assert LSUNImageSource(path).read_bytes(1) == b"2"
    assert not is_lmdb(tmp_path)


def test_a_damaged_index_is_made_again(tmp_path, cache):
    folder = write_lsun(tmp_path / "cat")
    expected = list(LSUNImageSource(folder).keys)
    (index,) = (cache / "lsun").iterdir()
    content = index.read_bytes()
    for damaged in (b"", content[:150], content[:-1], content[:200] + b"x" + content[201:], content + b"x"):
        index.write_bytes(damaged)
        assert list(LSUNImageSource(folder).keys) == expected
        assert index.read_bytes() == content


@pytest.mark.parametrize("fraction", [0, 0.01, 0.5, 0.99])
def test_an_empty_or_truncated_database_is_refused(fraction, tmp_path):
    values = np.random.default_rng(0).bytes(3000)
    folder = write_entries(tmp_path / "db", {f"{i:05d}".encode(): values for i in range(600 if fraction else 0)})
    if fraction:
        file = folder / "data.mdb"
        os.truncate(file, int(file.stat().st_size * fraction) // 4096 * 4096)
    with pytest.raises(UserError, match=r"`data.root`.*db"):
        LSUNImageSource(folder)


def test_a_database_that_ends_its_reader_by_a_signal_is_refused(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text("import os, signal; os.kill(os.getpid(), signal.SIGBUS)")
    monkeypatch.setattr("sagl.data.lmdb_keys.__file__", str(program))
    with pytest.raises(UserError, match=r"`data.root`.*cat"):
        LSUNImageSource(write_lsun(tmp_path / "cat"))


def test_a_missing_or_corrupt_database_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"`data.root`.*horse.*horse_train_lmdb"):
        find_lsun_folder(tmp_path, "horse")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(UserError, match=r"`data.root`.*cat"):
        LSUNImageSource(tmp_path / "cat")
