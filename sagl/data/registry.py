"""Opening of an image source by its path or name."""

import os
from pathlib import Path

from sagl.data.fashion_mnist import FashionMNISTImageSource
from sagl.data.folder import IMAGE_SUFFIXES, FolderImageSource
from sagl.data.image_data import ImageSource
from sagl.data.lsun import LSUNImageSource, is_lmdb
from sagl.data.npz import NpzImageSource
from sagl.data.webdataset import open_shards
from sagl.data.webdataset_files import tar_files
from sagl.errors import require
from sagl.utils.files import cache_folder
from sagl.utils.listing import is_hidden

OTHER_FORMATS = {
    ".pkl": "Pickles can run code and are not read. Save mu and sigma with numpy.savez",
    ".pickle": "Pickles can run code and are not read. Save mu and sigma with numpy.savez",
    ".npy": "Save the images with numpy.savez(FILE, images)",
    ".zip": "Unpack it into a folder",
    ".gz": "Decompress it",
    ".tgz": "Decompress it to .tar",
    ".parquet": "Write its images into a folder",
    ".h5": "Write its images into a folder",
    ".hdf5": "Write its images into a folder",
}
"""Suffixes of common files that are not read, with what to do."""


def open_image_source(name: str, labels: str | None = None, argument: str = "source") -> ImageSource:
    """Return the image source at a path: a folder of images, an LMDB, an npz file or WebDataset shards.

    Args:
        name: path, fashion_mnist, or a glob, brace range or URL of shards.
        labels: labels of a folder of images: folders, none or a .csv file.
        argument: name of `name` in messages.

    Raises:
        UserError: there is no such source, or `labels` is given for another source than a folder.
    """
    path = Path(name)
    is_database = is_lmdb(path)
    is_folder = os.path.isdir(path) and not is_database and not tar_files(path)
    require(is_folder or labels is None, f"`labels` must be left out unless images are in a folder, got {name}.")
    if is_folder:
        return FolderImageSource(path, labels or "none", argument=argument, labels_argument="labels")
    if is_database:
        return LSUNImageSource(path, argument=argument)
    if name == "fashion_mnist":
        return FashionMNISTImageSource(cache_folder())
    if path.suffix.lower() == ".npz":
        return NpzImageSource(path, argument=argument)
    hint = OTHER_FORMATS.get(path.suffix.lower())
    require(
        hint is None or not os.path.isfile(path),
        f"`{argument}` must be a folder of images, an npz file, an LMDB or shards (.tar), got {name}. {hint}.",
    )
    if os.path.isdir(path):
        _require_shards_only(path, argument)
    return open_shards(name, argument=argument)


def _require_shards_only(folder: Path, argument: str) -> None:
    """Refuse a folder that holds shards and, beside them, images or folders that may hold images."""
    others = (path for path in sorted(folder.glob("*")) if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES)
    other = next((path.name for path in others if not is_hidden(path.name)), None)
    require(
        other is None,
        f"`{argument}` must be a folder of images or of shards (.tar), and {folder} holds {tar_files(folder)[0].name} "
        f"and {other}. Move one of them, or write the shards as a pattern: {folder}/*.tar.",
    )
