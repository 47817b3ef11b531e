"""Opening of an image source by its path or name."""

from pathlib import Path

from sagl.data.fashion_mnist import FashionMNISTImageSource
from sagl.data.folder import FolderImageSource
from sagl.data.image_data import ImageSource
from sagl.data.lsun import LSUNImageSource
from sagl.data.npz import NpzImageSource
from sagl.data.webdataset import open_shards
from sagl.errors import require
from sagl.utils.files import cache_folder


def open_image_source(name: str, labels: str | None = None, argument: str = "source") -> ImageSource:
    """Return the image source at a path: a folder of images, LSUN's LMDB, an npz file or WebDataset shards.

    Args:
        name: path, fashion_mnist, or a glob, brace range or URL of shards.
        labels: labels of a folder of images: folders, none or a .csv file.
        argument: name of `name` in messages.

    Raises:
        UserError: there is no such source, or `labels` is given for another source than a folder.
    """
    path = Path(name)
    is_lsun = (path / "data.mdb").is_file()
    is_folder = path.is_dir() and not is_lsun and not any(path.glob("*.tar"))
    require(is_folder or labels is None, f"`labels` must be left out unless images are in a folder, got {name}.")
    if is_folder:
        return FolderImageSource(path, labels or "none", argument=argument, labels_argument="labels")
    if is_lsun:
        return LSUNImageSource(path, argument=argument)
    if name == "fashion_mnist":
        return FashionMNISTImageSource(cache_folder())
    if path.suffix == ".npz":
        return NpzImageSource(path, argument=argument)
    return open_shards(name, argument=argument)
