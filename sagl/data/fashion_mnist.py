"""Fashion-MNIST as 32x32 images: 28x28 with a frame of 2 black pixels (Xiao et al. 2017)."""

import gzip
import os
import shutil
import tempfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset
from torchvision.datasets import FashionMNIST

from sagl.settings.errors import UserError
from sagl.settings.paths import cache_folder
from sagl.shapes import ImageUint8, Labels

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four files, gzipped."""


class PaddedFashionMNIST(Dataset[tuple[Tensor, Tensor]]):
    """One split in memory: item -> (1, 32, 32) uint8, () int64."""

    def __init__(self, root: Path, *, train: bool) -> None:
        split = FashionMNIST(root, train=train)
        self.images: ImageUint8 = F.pad(split.data[:, None], (2, 2, 2, 2))
        self.labels: Labels = split.targets

    def __len__(self) -> int:
        """60,000 or 10,000."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image and its class."""
        return self.images[index], self.labels[index]


class FashionMNISTData(LightningDataModule):
    """Training split and test split of Fashion-MNIST; batches of ((B, 1, 32, 32) uint8, (B,) int64)."""

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        num_validation: int = 2000,
        seed: int = 0,
    ) -> None:
        """Name the data; nothing is read yet.

        Args:
            root: folder that holds, or is to hold, FashionMNIST/raw; by default the cache folder.
            batch_size: images a batch and process.
            num_workers: loader processes; the images are in memory, so 0 is fast.
            num_validation: images of the test split that validation looks at.
            seed: of the order of the training images.
        """
        super().__init__()
        self.root = Path(root) if root else cache_folder()
        self.batch_size, self.num_workers, self.num_validation, self.seed = (
            batch_size,
            num_workers,
            num_validation,
            seed,
        )

    def prepare_data(self) -> None:
        """Find, unpack or download the files, once a machine."""
        fetch(self.root)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled, whole batches only; a resumed run goes on in a new order."""
        split = PaddedFashionMNIST(self.root, train=True)
        resumed_at = self.trainer.global_step if self.trainer else 0
        seed = int(np.random.SeedSequence([self.seed, resumed_at]).generate_state(1)[0])
        order = RandomSampler(split, generator=torch.Generator().manual_seed(seed))
        return DataLoader(split, self.batch_size, sampler=order, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The first images of the test split, always the same."""
        split = PaddedFashionMNIST(self.root, train=False)
        first = Subset(split, range(min(self.num_validation, len(split))))
        return DataLoader(first, self.batch_size, num_workers=self.num_workers)


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
