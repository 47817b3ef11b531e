"""Fashion-MNIST (Xiao et al. 2017). For training, its 28x28 images are padded to 32x32 with black pixels."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

from torch.nn import functional as F
from torchvision.datasets import FashionMNIST

from sagl.data.in_memory import InMemoryData, InMemoryImages
from sagl.data.npz import ArrayImageSource
from sagl.errors import UserError
from sagl.utils.files import cache_file, cache_folder

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Folder in which Debian's package dataset-fashion-mnist installs the four gzipped files."""
FILES = [Path(name).stem for name, _ in FashionMNIST.resources]


class PaddedFashionMNIST(InMemoryImages):
    """Dataset of one split, (N, 1, 32, 32) uint8."""

    def __init__(self, root: Path, *, train: bool) -> None:
        split = FashionMNIST(root, train=train)
        super().__init__(F.pad(split.data[:, None], (2, 2, 2, 2)), split.targets)


class FashionMNISTImageSource(ArrayImageSource):
    """Image source of the training split as published, 28x28."""

    num_classes = 10

    def __init__(self, root: Path) -> None:
        """Read the split; download it if `root` does not hold it."""
        prepare_fashion_mnist(root)
        split = FashionMNIST(root, train=True)
        self.images, self.labels = split.data[..., None].numpy(), split.targets.numpy()

    def name(self, index: int) -> str:
        return f"image {index} of Fashion-MNIST"


@dataclass(kw_only=True, eq=False)
class FashionMNISTData(InMemoryData):
    """Data module of the padded Fashion-MNIST. Batches are ((B, 1, 32, 32) uint8, (B,) int64)."""

    root: str | None = None
    """Folder that holds FashionMNIST/raw, or to which it is downloaded; by default the cache folder."""
    num_validation: int = 2000
    """Validation images: the first of the test split. The others are the test images."""

    @property
    def folder(self) -> Path:
        return Path(self.root) if self.root else cache_folder()

    def prepare_data(self) -> None:
        prepare_fashion_mnist(self.folder)

    def split(self, *, test: bool) -> InMemoryImages:
        return PaddedFashionMNIST(self.folder, train=not test)


def has_fashion_mnist(root: Path) -> bool:
    """Return whether `root` holds the unpacked data set."""
    return all((_raw_folder(root) / name).is_file() for name in FILES)


def prepare_fashion_mnist(root: Path) -> None:
    """Unpack Debian's package into `root`, or download the data set, unless `root` holds it.

    Raises:
        UserError: the data set is not on this machine and the download fails.
    """
    raw = _raw_folder(root)
    if has_fashion_mnist(root):
        return
    raw.mkdir(parents=True, exist_ok=True)
    if all((DEBIAN_FOLDER / f"{name}.gz").is_file() for name in FILES):
        for name in FILES:
            with gzip.open(DEBIAN_FOLDER / f"{name}.gz") as source, cache_file(raw / name, "data.root") as partial:
                partial.write_bytes(source.read())
        return
    try:
        FashionMNIST(root, download=True)
    except (RuntimeError, URLError, OSError) as error:
        raise UserError(
            f"`data.root` must hold Fashion-MNIST, and it is neither in {raw} nor in {DEBIAN_FOLDER}, and the download "
            "failed. On Debian or Ubuntu: apt-get install dataset-fashion-mnist; elsewhere put the four unpacked "
            f"*-ubyte files into {raw}."
        ) from error


def _raw_folder(root: Path) -> Path:
    return root / "FashionMNIST" / "raw"
