import io
import os
import subprocess
import sys

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets.lsun import LSUNClass

from sagl.data.image_data import Cut, Pictures
from sagl.data.lsun import LSUNData, LSUNImageSource, lsun_folder
from sagl.errors import UserError
from tests.helpers.tiny import QUIET, contents

pytestmark = QUIET

COUNT = 10


def write_lsun(folder, kind="WEBP"):
    """A category as LSUN packs it: encoded pictures under keys of 40 hexadecimal digits."""
    environment = lmdb.open(str(folder), map_size=1 << 22)
    with environment.begin(write=True) as transaction:
        for i in range(COUNT):
            file = io.BytesIO()
            Image.new("RGB", (20, 16), (20 * i, 0, 0)).save(file, kind, quality=95)
            transaction.put(f"{i:040x}".encode(), file.getvalue())
    environment.close()
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["WEBP", "JPEG"])
def test_pictures_are_those_that_torchvision_reads_in_the_same_order(kind, tmp_path, monkeypatch):
    folder = write_lsun(tmp_path / "cat", kind)
    in_process = (
        "import sys; from torchvision.datasets.lsun import LSUNClass; import numpy as np;"
        "np.save('theirs.npy', np.stack([np.array(image) for image, _ in LSUNClass(sys.argv[1])]))"
    )  # on its own: one process opens a database once
    subprocess.run([sys.executable, "-c", in_process, str(folder)], cwd=tmp_path, check=True)
    ours = LSUNImageSource(folder)
    assert len(ours) == COUNT
    decoded = np.stack([np.array(Image.open(io.BytesIO(ours.encoded(i))).convert("RGB")) for i in range(COUNT)])
    assert np.array_equal(decoded, np.load(tmp_path / "theirs.npy"))


def test_it_is_torchvision_s_class_and_its_items_work(tmp_path):
    pictures = LSUNImageSource(write_lsun(tmp_path / "cat"))
    assert isinstance(pictures, LSUNClass)
    assert pictures[3][0].size == (20, 16)


def test_keys_are_listed_once_as_plain_data_in_the_cache_and_nowhere_else(tmp_path, cache, monkeypatch):
    folder = write_lsun(tmp_path / "cat")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = contents(folder)
    LSUNImageSource(folder)
    assert list((tmp_path / "here").iterdir()) == []
    assert contents(folder) == before
    (kept,) = (cache / "lsun").iterdir()
    keys = np.load(kept, allow_pickle=False)
    assert keys.tolist() == [f"{i:040x}".encode() for i in range(COUNT)]
    np.save(kept, keys[:4])
    assert len(LSUNImageSource(folder)) == 4  # the record was read
    os.utime(folder / "data.mdb", ns=(1, 1))
    assert len(LSUNImageSource(folder)) == COUNT  # another database


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_any_kind_of_worker_process_reads_them(method, tmp_path):
    source = LSUNImageSource(write_lsun(tmp_path / "cat", "JPEG"))
    source.encoded(0)  # the parent has it open
    images = Pictures(source, np.arange(COUNT), Cut(side=8, channels=3))
    loader = DataLoader(images, 3, num_workers=2, multiprocessing_context=method)
    seen = torch.cat([batch for batch, *_ in loader])
    assert torch.equal(seen, torch.stack([images[i][0] for i in range(COUNT)]))


def test_damaged_entries_are_stood_in_for_named_and_counted(tmp_path):
    environment = lmdb.open(str(write_lsun(tmp_path / "cat", "JPEG")), map_size=1 << 22)
    with environment.begin(write=True) as transaction:
        whole = transaction.get(f"{2:040x}".encode())
        transaction.put(f"{2:040x}".encode(), whole[: len(whole) // 3])
        transaction.put(f"{7:040x}".encode(), b"")
    environment.close()
    data = LSUNData(category="cat", root=str(tmp_path), batch_size=2, num_validation=0, num_workers=0, image_size=8)
    data.max_corrupt_fraction = 0.2
    data.setup("fit")
    assert sum(len(images) for images, _ in data.train_dataloader()) == COUNT
    assert data._damaged.names == {f"{place:040x} in {tmp_path / 'cat'}" for place in (2, 7)}


@pytest.mark.parametrize("name", ["cat", "cat_lmdb", "cat_train_lmdb"])
def test_a_category_is_found_whatever_its_archive_was_called(name, tmp_path):
    folder = write_lsun(tmp_path / name)
    assert lsun_folder(tmp_path, "cat") == folder
    assert lsun_folder(folder, "cat") == folder


def test_a_category_that_is_not_there_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"`data.root` must hold LSUN's horse.*horse_train_lmdb") as error:
        lsun_folder(tmp_path, "horse")
    assert "\n" not in str(error.value)


def test_a_damaged_database_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="damaged"):
        LSUNImageSource(tmp_path / "cat")


def test_the_module_gives_batches_for_training_and_for_validation(tmp_path):
    (tmp_path / "lsun").mkdir()
    write_lsun(tmp_path / "lsun" / "cat")
    module = LSUNData(
        category="cat", root=str(tmp_path / "lsun"), batch_size=2, num_workers=0, num_validation=4, image_size=8
    )
    module.setup("fit")
    assert [tuple(images.shape) for images, _ in module.train_dataloader()] == [(2, 3, 8, 8)] * 3
    assert [labels.tolist() for _, labels in module.val_dataloader()] == [[-1, -1]] * 2
