import gzip
from urllib.error import URLError

import pytest
import torch
from torchvision.datasets import FashionMNIST

from sagl.data import fashion_mnist
from sagl.data.fashion_mnist import FashionMNISTData, PaddedFashionMNIST, fetch
from sagl.errors import UserError
from tests.helpers.tiny import contents, write_fashion_mnist


@pytest.fixture(autouse=True)
def no_debian_package(monkeypatch, tmp_path):
    """As on a machine that does not have it."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")


@pytest.fixture(autouse=True)
def network(monkeypatch):
    """What a download meets: an exception, or None for success; downloads that were tried are counted."""
    state = {"fails_with": URLError("no route to host"), "tried": 0}

    def download(_):
        state["tried"] += 1
        if state["fails_with"]:
            raise state["fails_with"]

    monkeypatch.setattr(FashionMNIST, "download", download)
    return state


def pack_as_debian_does(raw, folder):
    folder.mkdir()
    for file in raw.iterdir():
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))


# ------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(("train", "count"), [(True, 200), (False, 40)])
def test_images_are_the_28x28_ones_in_a_frame_of_two_black_pixels(train, count, tmp_path):
    write_fashion_mnist(tmp_path)
    split, source = PaddedFashionMNIST(tmp_path, train=train), FashionMNIST(tmp_path, train=train)
    assert len(split) == count
    image, label = split[7]
    assert (image.shape, image.dtype, label.dtype) == ((1, 32, 32), torch.uint8, torch.int64)
    assert torch.equal(image[0, 2:-2, 2:-2], source.data[7])
    assert int(label) == int(source.targets[7])
    frame = split.images.clone()
    frame[..., 2:-2, 2:-2] = 0
    assert int(frame.max()) == 0


# ------------------------------------------------------------------------------------------------ where they are


def test_files_that_are_there_are_left_as_they_are(tmp_path, network):
    write_fashion_mnist(tmp_path)
    before = contents(tmp_path)
    fetch(tmp_path)
    assert contents(tmp_path) == before
    assert network["tried"] == 0


def test_debian_s_files_are_unpacked_without_a_network(tmp_path, network):
    raw = write_fashion_mnist(tmp_path / "made")
    pack_as_debian_does(raw, tmp_path / "debian")
    fetch(tmp_path / "root")
    unpacked = tmp_path / "root" / "FashionMNIST" / "raw"
    assert {p.name: p.read_bytes() for p in unpacked.iterdir()} == {p.name: p.read_bytes() for p in raw.iterdir()}
    assert network["tried"] == 0
    assert len(PaddedFashionMNIST(tmp_path / "root", train=True)) == 200


def test_a_damaged_debian_file_is_not_taken_for_data(tmp_path):
    raw = write_fashion_mnist(tmp_path / "made")
    pack_as_debian_does(raw, tmp_path / "debian")
    packed = tmp_path / "debian" / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:5000])
    with pytest.raises((EOFError, UserError)):
        fetch(tmp_path / "root")
    assert not (tmp_path / "root" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").exists()


def test_an_incomplete_debian_folder_is_not_used(tmp_path, network):
    pack_as_debian_does(write_fashion_mnist(tmp_path / "made"), tmp_path / "debian")
    (tmp_path / "debian" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError):
        fetch(tmp_path / "root")
    assert network["tried"] == 1


@pytest.mark.parametrize(
    "failure", [URLError("no route to host"), RuntimeError("Error downloading"), ConnectionResetError("reset")]
)
def test_where_nothing_works_one_line_says_how_to_get_the_data(failure, tmp_path, network):
    network["fails_with"] = failure
    with pytest.raises(UserError) as error:
        fetch(tmp_path / "root")
    said = str(error.value)
    parts = ("`data.root`", str(tmp_path / "root" / "FashionMNIST" / "raw"), "apt-get install dataset-fashion-mnist")
    assert [part for part in parts if part not in said] == []
    assert "\n" not in said


def test_a_download_is_the_last_resort_and_enough(tmp_path, network, monkeypatch):
    network["fails_with"] = None
    monkeypatch.setattr(FashionMNIST, "_check_exists", lambda _: True)
    monkeypatch.setattr(FashionMNIST, "_load_data", lambda _: (None, None))
    fetch(tmp_path / "root")
    assert network["tried"] == 1


# ------------------------------------------------------------------------------------------------- data module


def module_on(tmp_path, **options):
    write_fashion_mnist(tmp_path)
    module = FashionMNISTData(**{"root": str(tmp_path), "batch_size": 16, **options})
    module.prepare_data()
    return module


def test_a_training_pass_shows_every_image_at_most_once_in_whole_batches(tmp_path):
    batches = list(module_on(tmp_path).train_dataloader())
    assert [tuple(images.shape) for images, _ in batches] == [(16, 1, 32, 32)] * 12
    assert len({image.numpy().tobytes() for images, _ in batches for image in images}) == 12 * 16
    labels = {image.numpy().tobytes(): int(label) for image, label in PaddedFashionMNIST(tmp_path, train=True)}
    for images, found in batches:
        assert [labels[image.numpy().tobytes()] for image in images] == found.tolist()


@pytest.mark.parametrize(("asked", "got"), [(20, 20), (2000, 40)])
def test_validation_looks_at_the_first_images_of_the_test_split(asked, got, tmp_path):
    loader = module_on(tmp_path, num_validation=asked).val_dataloader()
    images = torch.cat([images for images, _ in loader])
    assert torch.equal(images, PaddedFashionMNIST(tmp_path, train=False).images[:got])


def test_a_test_looks_at_the_rest_of_the_test_split(tmp_path):
    module = module_on(tmp_path, num_validation=25)
    images = torch.cat([images for images, _ in module.test_dataloader()])
    assert torch.equal(images, PaddedFashionMNIST(tmp_path, train=False).images[25:])
    module.num_validation = 40
    with pytest.raises(UserError, match=r"`data.num_validation` must leave images to test on, got 40"):
        module.test_dataloader()


def test_the_data_are_kept_in_the_cache_folder_unless_said_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    assert FashionMNISTData().folder == tmp_path / "cache"
    assert FashionMNISTData(root=str(tmp_path / "mine")).folder == tmp_path / "mine"
