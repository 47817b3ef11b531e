"""LSUN: any category's LMDB, read through torchvision.

Replaced of torchvision's `LSUNClass`: it opens the database when it is made, which a worker process cannot inherit,
and keeps its keys as a pickle in the working directory, from where it would run it. Here each process opens the
database when it first reads, and the keys are plain text in the cache folder.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
from torchvision.datasets.lsun import LSUNClass

from sagl.data.image_data import NO_LABEL, ImageDataModule, Source
from sagl.errors import UserError, require
from sagl.utils.files import atomic_file, cache_folder

ARCHIVES = "http://dl.yf.io/lsun"
ENDINGS = ("", "_lmdb", "_train_lmdb")
"""What the archives of LSUN's objects and scenes call a category's folder, behind its name."""
_OPEN: dict[str, tuple[int, lmdb.Environment]] = {}
"""Databases by folder, with the process that opened them; lmdb allows each once in a process."""


class LSUNImageSource(LSUNClass, Source):
    """One category without labels, in the order of its keys."""

    num_classes = None

    def __init__(self, folder: Path) -> None:
        """List an LMDB folder.

        Raises:
            UserError: it is none.
        """
        self.root, self.transform, self.target_transform = str(folder), None, None
        try:
            self.keys = _keys(folder)
        except lmdb.Error as error:
            raise UserError(f"`data.root` must be a whole LSUN database, and {folder} is damaged: {error}.") from error
        self.length = len(self.keys)

    @property
    def env(self) -> lmdb.Environment:
        """The database, opened once in each process."""
        return _opened(self.root)

    def encoded(self, index: int) -> bytes:
        """JPEG or WebP bytes."""
        with self.env.begin() as transaction:
            found = transaction.get(self.keys[index])
        assert found is not None  # every key was read from the database
        return bytes(found)

    def label(self, index: int) -> int:
        """LSUN's categories carry no classes."""
        return NO_LABEL

    def name(self, index: int) -> str:
        """Its key, and the folder."""
        return f"{self.keys[index].decode()} in {self.root}"


@dataclass(kw_only=True, eq=False)
class LSUNData(ImageDataModule):
    """A category of LSUN, objects (cat, horse, …) and scenes (bedroom, …) alike."""

    category: str
    """As LSUN names it: cat, horse, bedroom, …"""
    root: str = "lsun"
    """Folder with CATEGORY, CATEGORY_lmdb or CATEGORY_train_lmdb in it, or one of these itself."""

    def source(self) -> LSUNImageSource:
        """The category's pictures.

        Raises:
            UserError: its folder is not there.
        """
        return LSUNImageSource(lsun_folder(Path(self.root), self.category))


def lsun_folder(root: Path, category: str) -> Path:
    """Where a category lies under `root`, whatever its archive was called.

    Raises:
        UserError: nowhere.
    """
    known = [root / f"{category}{ending}" for ending in ENDINGS]
    found = [folder for folder in (*known, root) if (folder / "data.mdb").is_file()]
    require(
        bool(found),
        f"`data.root` must hold LSUN's {category}, and there is no data.mdb in {', '.join(map(str, known))}. "
        f"Fetch {ARCHIVES}/objects/{category}.zip (a scene: {ARCHIVES}/scenes/{category}_train_lmdb.zip), unpack it in "
        f"{root}, or give the folder that holds it with --data.root.",
    )
    return found[0]


def _opened(root: str) -> lmdb.Environment:
    """A database, opened once in each process."""
    process, environment = _OPEN.get(root, (None, None))
    if environment is None or process != os.getpid():
        if environment is not None:
            environment.close()  # a forked worker's copy of its parent's, which it must not read
        environment = lmdb.open(root, max_readers=1, readonly=True, lock=False, readahead=False, meminit=False)
        _OPEN[root] = (os.getpid(), environment)
    return environment


def _keys(folder: Path) -> "np.ndarray[tuple[int], np.dtype[np.bytes_]]":
    """All keys, from the cache where they are known; minutes for millions of pictures the first time."""
    stat = (folder / "data.mdb").stat()
    said = f"{folder.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    kept = cache_folder() / "lsun" / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.npy"
    if not kept.is_file():
        with _opened(str(folder)).begin() as transaction:
            keys = np.array(list(transaction.cursor().iternext(keys=True, values=False)), dtype=np.bytes_)
        with atomic_file(kept, "SAGL_CACHE") as partial, partial.open("wb") as file:
            np.save(file, keys)
    loaded: np.ndarray[tuple[int], np.dtype[np.bytes_]] = np.load(kept, mmap_mode="r")
    return loaded
