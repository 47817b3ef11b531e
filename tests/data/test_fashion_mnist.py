import gzip
from urllib.error import URLError

import pytest
import torch
from torchvision.datasets import FashionMNIST

from sagl.data import fashion_mnist
from sagl.data.fashion_mnist import FashionMNISTData, PaddedFashionMNIST, prepare_fashion_mnist
from sagl.errors import UserError
from tests.helpers.errors import refused
from tests.helpers.files import contents, write_fashion_mnist


@pytest.fixture(autouse=True)
def debian_folder(monkeypatch, tmp_path):
    """Replace the folder of Debian's package by one that does not exist."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    return tmp_path / "debian"


@pytest.fixture(autouse=True)
def network(monkeypatch):
    """Replace the download: `error` is what it raises, `downloads` counts its calls."""
    state = {"error": URLError("no route to host"), "downloads": 0}

    def download(_):
        state["downloads"] += 1
        if state["error"]:
            raise state["error"]

    monkeypatch.setattr(FashionMNIST, "download", download)
    return state


def gzip_files(raw, folder):
    folder.mkdir()
    for file in raw.iterdir():
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))


def raw_folder(root):
    return root / "FashionMNIST" / "raw"


@pytest.mark.parametrize(("train", "count"), [(True, 200), (False, 40)])
def test_images_are_the_published_ones_with_two_black_pixels_on_each_side(train, count, tmp_path):
    write_fashion_mnist(tmp_path)
    padded, published = PaddedFashionMNIST(tmp_path, train=train), FashionMNIST(tmp_path, train=train)
    assert len(padded) == count
    image, label, _ = padded[7]
    assert (image.shape, image.dtype) == ((1, 32, 32), torch.uint8)
    assert torch.equal(image[0, 2:-2, 2:-2], published.data[7])
    assert label == int(published.targets[7])
    border = padded.images.clone()
    border[..., 2:-2, 2:-2] = 0
    assert int(border.max()) == 0


def test_existing_files_are_not_changed(tmp_path, network):
    write_fashion_mnist(tmp_path)
    before = contents(tmp_path)
    prepare_fashion_mnist(tmp_path)
    assert contents(tmp_path) == before
    assert network["downloads"] == 0


def test_debians_files_are_unpacked_without_a_download(tmp_path, network, debian_folder):
    raw = write_fashion_mnist(tmp_path / "source")
    gzip_files(raw, debian_folder)
    prepare_fashion_mnist(tmp_path / "root")
    unpacked = {path.name: path.read_bytes() for path in raw_folder(tmp_path / "root").iterdir()}
    assert unpacked == {path.name: path.read_bytes() for path in raw.iterdir()}
    assert network["downloads"] == 0


@pytest.mark.parametrize(("name", "length", "downloads"), [("train-images", 5000, 0), ("t10k-labels", None, 1)])
def test_an_incomplete_debian_folder_is_not_used(name, length, downloads, tmp_path, network, debian_folder):
    gzip_files(write_fashion_mnist(tmp_path / "source"), debian_folder)
    (packed,) = debian_folder.glob(f"{name}-*")
    if length is None:
        packed.unlink()
    else:
        packed.write_bytes(packed.read_bytes()[:length])
    with pytest.raises((EOFError, UserError)):
        prepare_fashion_mnist(tmp_path / "root")
    assert list(raw_folder(tmp_path / "root").glob(f"{name}-*")) == []
    assert network["downloads"] == downloads


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("failed"), ConnectionResetError("reset")])
def test_a_failed_download_names_the_folder_and_the_package(error, tmp_path, network):
    network["error"] = error
    with refused("`data.root`", raw_folder(tmp_path / "root"), "dataset-fashion-mnist"):
        prepare_fashion_mnist(tmp_path / "root")


def test_files_that_exist_nowhere_are_downloaded(tmp_path, network, monkeypatch):
    network["error"] = None
    monkeypatch.setattr(FashionMNIST, "_check_exists", lambda _: True)
    monkeypatch.setattr(FashionMNIST, "_load_data", lambda _: (None, None))
    prepare_fashion_mnist(tmp_path / "root")
    assert network["downloads"] == 1


def data_module(tmp_path, **options):
    write_fashion_mnist(tmp_path)
    module = FashionMNISTData(**{"root": str(tmp_path), "batch_size": 16, **options})
    module.prepare_data()
    return module


def test_an_epoch_has_each_image_at_most_once_with_its_label(tmp_path):
    batches = list(data_module(tmp_path).train_dataloader())
    assert [tuple(images.shape) for images, _ in batches] == [(16, 1, 32, 32)] * 12
    assert len({image.numpy().tobytes() for images, _ in batches for image in images}) == 12 * 16
    label_of = {image.numpy().tobytes(): label for image, label in PaddedFashionMNIST(tmp_path, train=True)}
    for images, labels in batches:
        assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_validation_and_test_images_are_the_two_parts_of_the_test_split(tmp_path):
    module = data_module(tmp_path, num_validation=25)
    images = [
        torch.cat([images for images, _ in loader()]) for loader in (module.val_dataloader, module.test_dataloader)
    ]
    assert [len(part) for part in images] == [25, 15]
    assert torch.equal(torch.cat(images), PaddedFashionMNIST(tmp_path, train=False).images)
    module.num_validation = 2000
    for loader in (module.val_dataloader, module.test_dataloader):
        with pytest.raises(UserError, match=r"`data.num_validation`.* 40, .* 2000"):
            loader()


def test_the_default_folder_is_the_cache_folder(cache):
    assert FashionMNISTData().folder == cache


def test_a_negative_number_of_validation_images_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"`data.num_validation`.* -3"):
        data_module(tmp_path, num_validation=-3)
