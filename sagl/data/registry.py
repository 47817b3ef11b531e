"""The source of pictures that a name on the command line means."""

from functools import cached_property
from pathlib import Path

from torchvision.datasets import FashionMNIST

from sagl.data.array_source import Array, ArrayImageSource
from sagl.data.fashion_mnist import fetch
from sagl.data.folder import FolderImageSource
from sagl.data.image_data import Source
from sagl.data.lsun import LSUNImageSource
from sagl.data.npz import NpzImageSource
from sagl.data.webdataset import ShardData
from sagl.errors import UserError, require
from sagl.utils.files import cache_folder

FASHION_MNIST = "fashion_mnist"


class FashionMNISTPictures(ArrayImageSource):
    """The training split, 28x28 as it was published."""

    num_classes = 10

    def __init__(self, root: Path) -> None:
        """Read it; downloaded where it is not there."""
        fetch(root)
        self.split = FashionMNIST(root, train=True)
        self.labels: Array = self.split.targets.numpy()

    @cached_property
    def images(self) -> Array:
        """(60000, 28, 28, 1) uint8."""
        images: Array = self.split.data[..., None].numpy()
        return images

    def name(self, index: int) -> str:
        """Its place."""
        return f"image {index} of Fashion-MNIST"


def open_image_source(name: str, labels: str | None = None) -> Source:
    """LSUN's LMDB, a folder of pictures, an npz file, shards, or fashion_mnist.

    Args:
        name: a path; of shards also a glob, a brace range or an address.
        labels: of a folder of pictures: folders, none or a .csv file.

    Raises:
        UserError: it is none of these, or it is no folder of pictures and labels were given.
    """
    path = Path(name)
    is_folder = path.is_dir() and not (path / "data.mdb").is_file() and not any(path.glob("*.tar"))
    require(
        is_folder or labels is None, f"`labels` is for a folder of pictures, and {name} is none: leave --labels out."
    )
    try:
        return FolderImageSource(path, labels or "none") if is_folder else _packed(name)
    except UserError as error:
        said = str(error).replace("`data.labels`", "`labels`").replace("--data.labels", "--labels")
        for setting in ("root", "file", "shards"):
            said = said.replace(f"`data.{setting}`", "`source`")
        raise UserError(said) from error


def _packed(name: str) -> Source:
    """Pictures that are not files of their own."""
    path = Path(name)
    if (path / "data.mdb").is_file():
        return LSUNImageSource(path)
    if name == FASHION_MNIST:
        return FashionMNISTPictures(cache_folder())
    return NpzImageSource(path) if path.suffix == ".npz" else ShardData(shards=name).source()
