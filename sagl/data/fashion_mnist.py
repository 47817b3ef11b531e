"""Fashion-MNIST as 32x32 images: 28x28 with a frame of 2 black pixels (Xiao et al. 2017)."""

import gzip
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

from lightning.pytorch import LightningDataModule
from torch.nn import functional as F
from torchvision.datasets import FashionMNIST

from sagl.data.dataloader import Images, Loader, LoaderSettings, Pair, ResumableDataLoader, eval_loader, training_loader
from sagl.errors import UserError, require
from sagl.shapes import ImageUint8, Labels
from sagl.utils.files import cache_folder

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four files, gzipped."""


class PaddedFashionMNIST(Images):
    """One split in memory: item -> (1, 32, 32) uint8, () int64."""

    def __init__(self, root: Path, *, train: bool) -> None:
        split = FashionMNIST(root, train=train)
        self.images: ImageUint8 = F.pad(split.data[:, None], (2, 2, 2, 2))
        self.labels: Labels = split.targets

    def __len__(self) -> int:
        """60,000 or 10,000."""
        return len(self.images)

    def __getitem__(self, item: int) -> Pair:
        """An image and its class, the same in every epoch."""
        return self.images[item % len(self)], self.labels[item % len(self)]


@dataclass(kw_only=True, eq=False)
class FashionMNISTData(LightningDataModule):
    """Training split and test split of Fashion-MNIST; batches of ((B, 1, 32, 32) uint8, (B,) int64)."""

    root: str | None = None
    """Folder that holds, or is to hold, FashionMNIST/raw; by default the cache folder."""
    batch_size: int = 64
    """Images a batch and process."""
    num_workers: int = 0
    """Loader processes; the images are in memory, so 0 is fast."""
    num_validation: int = 2000
    """Images of the test split that validation looks at."""
    seed: int = 0
    """Of the order of the training images."""

    def __post_init__(self) -> None:
        """Nothing is read yet."""
        super().__init__()

    @property
    def folder(self) -> Path:
        """Where the data are kept."""
        return Path(self.root) if self.root else cache_folder()

    def prepare_data(self) -> None:
        """Find, unpack or download the files, once a machine."""
        fetch(self.folder)

    def train_dataloader(self) -> ResumableDataLoader:
        """The training split, in a new order each epoch."""
        split = PaddedFashionMNIST(self.folder, train=True)
        return training_loader(split, self._reading, self.seed, self.trainer)

    def val_dataloader(self) -> Loader:
        """The first images of the test split, always the same."""
        return self._of_test_split(slice(self.num_validation))

    def test_dataloader(self) -> Loader:
        """The rest of the test split.

        Raises:
            UserError: validation has all of it.
        """
        rest = self._of_test_split(slice(self.num_validation, None))
        require(len(rest) > 0, f"`data.num_validation` must leave images to test on, got {self.num_validation}.")
        return rest

    def _of_test_split(self, part: slice) -> Loader:
        split = PaddedFashionMNIST(self.folder, train=False)
        split.images, split.labels = split.images[part], split.labels[part]
        return eval_loader(split, self._reading, self.trainer)

    @property
    def _reading(self) -> LoaderSettings:
        return LoaderSettings(batch_size=self.batch_size, num_workers=self.num_workers)


def is_there(root: Path) -> bool:
    """Whether `root` holds the data set, unpacked."""
    raw = root / "FashionMNIST" / "raw"
    return all((raw / Path(name).stem).is_file() for name, _ in FashionMNIST.resources)


def fetch(root: Path) -> None:
    """Make sure that `root` holds the data set: as it is, from Debian's package, or from the network.

    Raises:
        UserError: none of the three works.
    """
    raw = root / "FashionMNIST" / "raw"
    names = [Path(name).stem for name, _ in FashionMNIST.resources]
    if is_there(root):
        return
    raw.mkdir(parents=True, exist_ok=True)
    if all((DEBIAN_FOLDER / f"{name}.gz").is_file() for name in names):
        for name in names:
            _unpack(DEBIAN_FOLDER / f"{name}.gz", raw / name)
        return
    try:
        FashionMNIST(root, download=True)
    except (RuntimeError, URLError, OSError) as error:
        raise UserError(
            f"`data.root` must hold Fashion-MNIST, and it is neither in {raw} nor in {DEBIAN_FOLDER}, nor could it be "
            "downloaded. On Debian or Ubuntu: apt-get install dataset-fashion-mnist; elsewhere put the four "
            f"*-ubyte files (unpacked) into {raw}."
        ) from error


def _unpack(packed: Path, target: Path) -> None:
    """Gunzip, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        copy = Path(folder) / target.name
        with gzip.open(packed) as source, copy.open("wb") as unpacked:
            shutil.copyfileobj(source, unpacked)
        os.replace(copy, target)
