"""LSUN: the LMDB of any category, read through torchvision.

torchvision's `LSUNClass` opens the database in its constructor, so worker processes cannot inherit it, and stores the
keys as a pickle in the working directory, which it loads again. Here each process opens the database when it first
reads, and the keys are a plain array in the cache folder.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
from torchvision.datasets.lsun import LSUNClass

from sagl.data.image_data import Array, ImageDataModule, ImageSource, cached_index
from sagl.errors import UserError

DOWNLOADS = "http://dl.yf.io/lsun"
SUFFIXES = ("", "_lmdb", "_train_lmdb")
"""Suffixes that LSUN's archives of objects and scenes append to the name of a category."""
_ENVIRONMENTS: dict[str, tuple[int, lmdb.Environment]] = {}
"""Open databases by folder, with the id of the process; lmdb allows a database to be opened once per process."""


class LSUNImageSource(ImageSource, LSUNClass):
    """Image source of one category of LSUN, without labels, in the order of the keys."""

    def __init__(self, folder: Path, *, argument: str = "data.root") -> None:
        """List the keys, which takes minutes for millions of images the first time.

        Args:
            folder: folder with data.mdb.
            argument: name of `folder` in messages.

        Raises:
            UserError: the database is corrupt.
        """
        self.root, self.transform, self.target_transform = str(folder), None, None
        try:
            self.keys = cached_index(folder / "data.mdb", "lsun", self._read_keys)
        except lmdb.Error as error:
            raise UserError(f"`{argument}` must be an LSUN database, and {folder} is corrupt: {error}.") from error

    @property
    def env(self) -> lmdb.Environment:
        """The database, opened once in each process."""
        process, environment = _ENVIRONMENTS.get(self.root, (None, None))
        if environment is None or process != os.getpid():
            if environment is not None:
                environment.close()  # inherited from the parent process, and not to be read in this one
            environment = lmdb.open(self.root, max_readers=1, readonly=True, lock=False, readahead=False, meminit=False)
            _ENVIRONMENTS[self.root] = (os.getpid(), environment)
        return environment

    def __len__(self) -> int:
        return len(self.keys)

    def read_bytes(self, index: int) -> bytes:
        with self.env.begin() as transaction:
            return bytes(transaction.get(self.keys[index]) or b"")

    def name(self, index: int) -> str:
        return f"{self.keys[index].decode()} in {self.root}"

    def _read_keys(self) -> Array:
        with self.env.begin() as transaction:
            return np.array(list(transaction.cursor().iternext(keys=True, values=False)), dtype=np.bytes_)


@dataclass(kw_only=True, eq=False)
class LSUNData(ImageDataModule):
    """Data module of a category of LSUN: objects (cat, horse, …) or scenes (bedroom, …)."""

    category: str
    """Category, as LSUN names it: cat, horse, bedroom, …"""
    root: str = "lsun"
    """Folder that holds CATEGORY, CATEGORY_lmdb or CATEGORY_train_lmdb, or one of these folders itself."""

    def source(self) -> LSUNImageSource:
        return LSUNImageSource(find_lsun_folder(Path(self.root), self.category))


def find_lsun_folder(root: Path, category: str) -> Path:
    """Return the folder of a category: `root` itself, or one in `root` with a name that LSUN's archives use.

    Raises:
        UserError: there is none.
    """
    candidates = [*(root / f"{category}{suffix}" for suffix in SUFFIXES), root]
    for folder in candidates:
        if (folder / "data.mdb").is_file():
            return folder
    raise UserError(
        f"`data.root` must hold LSUN's {category}, and there is no data.mdb in {', '.join(map(str, candidates))}. "
        f"Download {DOWNLOADS}/objects/{category}.zip (a scene: {DOWNLOADS}/scenes/{category}_train_lmdb.zip) and "
        f"unpack it in {root}."
    )
