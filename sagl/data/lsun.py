"""LSUN: the LMDB of any category, read through torchvision.

torchvision's `LSUNClass` opens the database in its constructor, so worker processes cannot inherit it, and stores the
keys as a pickle in the working directory, which it loads again. Here each process opens the database when it first
reads, and the keys are a plain array in the cache folder.
"""

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
from torchvision.datasets.lsun import LSUNClass

from sagl.data import lmdb_keys
from sagl.data.image_data import Array, ImageDataModule, ImageSource, cached_index
from sagl.errors import UserError, require

DOWNLOADS = "http://dl.yf.io/lsun"
SUFFIXES = ("", "_lmdb", "_train_lmdb")
"""Suffixes that LSUN's archives of objects and scenes append to the name of a category."""
FILE_SUFFIXES = (".lmdb", ".mdb")
"""Suffixes of databases that are files rather than folders with data.mdb."""
_ENVIRONMENTS: dict[str, tuple[int, lmdb.Environment]] = {}
"""Open databases by real path, with the id of the process; lmdb allows a database to be opened once per process."""


def is_lmdb(path: Path) -> bool:
    """Return whether this is a folder with data.mdb, or a database in one file."""
    # Path.is_file raises an error for a folder without permission.
    return os.path.isfile(path / "data.mdb") or (path.suffix.lower() in FILE_SUFFIXES and os.path.isfile(path))


class Keys(Sequence[bytes]):
    """Keys of a database, from the array of `lmdb_keys`."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
        return bytes(self.array[index])[:-1]


class LSUNImageSource(ImageSource, LSUNClass):
    """Image source of one category of LSUN, without labels, in the order of the keys."""

    def __init__(self, path: Path, *, argument: str = "data.root") -> None:
        """List the keys, which takes minutes for millions of images the first time.

        Args:
            path: folder with data.mdb, or a database in one file.
            argument: name of `path` in messages.

        Raises:
            UserError: the database is empty or corrupt.
        """
        self.root, self.transform, self.target_transform = str(path), None, None
        file = path / "data.mdb" if path.is_dir() else path
        self.keys = Keys(cached_index(file, "lsun", lambda: _list_keys(path, argument)))
        require(len(self.keys) > 0, f"`{argument}` must be an LMDB of images, and {path} has no entries.")

    @property
    def env(self) -> lmdb.Environment:
        """The database, opened once in each process."""
        path = os.path.realpath(self.root)
        process, environment = _ENVIRONMENTS.get(path, (None, None))
        if environment is None or process != os.getpid():
            if environment is not None:
                environment.close()  # inherited from the parent process, and not to be read in this one
            environment = lmdb.open(
                os.fsencode(path),
                subdir=os.path.isdir(path),
                max_readers=1,
                readonly=True,
                lock=False,
                readahead=False,
                meminit=False,
            )
            _ENVIRONMENTS[path] = (os.getpid(), environment)
        return environment

    def __len__(self) -> int:
        return len(self.keys)

    def read_bytes(self, index: int) -> bytes:
        with self.env.begin() as transaction:
            return bytes(transaction.get(self.keys[index]) or b"")

    def name(self, index: int) -> str:
        return f"{self.keys[index].decode(errors='backslashreplace')} in {self.root}"


def _list_keys(path: Path, argument: str) -> Array:
    """Run `lmdb_keys`.

    Raises:
        UserError: the database is corrupt.
    """
    program = [sys.executable, "-P", lmdb_keys.__file__, os.fspath(path)]
    result = subprocess.run(program, capture_output=True, check=False)
    reason = result.stderr.decode(errors="backslashreplace").strip().splitlines()[-1:] or [
        "reading it ends by a signal"
    ]
    require(
        result.returncode == 0,
        f"`{argument}` must be an LMDB of images, and {path} is corrupt: {reason[0]}. Copy or download it again.",
    )
    keys: Array = np.load(io.BytesIO(result.stdout))
    return keys


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
