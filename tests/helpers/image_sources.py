"""Small data sets of every kind that sagl reads."""

import io
import tarfile

import lmdb
import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from sagl.data.image_data import NO_LABEL, ImageSource

FOLDER_FILES = ("dogs/b.png", "cats/1.JPG", "cats/deep/2.webp", "dogs/a.bmp", "birds/x.jpeg")
LSUN_COUNT = 10
NPZ_IMAGES = np.random.default_rng(0).integers(0, 256, (10, 12, 9, 3), dtype=np.uint8)
NPZ_LABELS = np.arange(10) % 4
START_METHODS = ["fork", *(pytest.param(method, marks=pytest.mark.slow) for method in ("spawn", "forkserver"))]
"""Start methods of workers; those that import sagl again are slow."""


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(value, kind="PNG", size=(9, 8)):
    """Encode an image of one grey value."""
    return encode(Image.new("RGB", size, (value,) * 3), kind)


def ramp(width, height):
    """Return an image whose red channel is x and whose green channel is y."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def read_all(source):
    return [(source.read_bytes(i), source.label(i)) for i in range(len(source))]


class MemorySource(ImageSource):
    """Encoded images in a list."""

    def __init__(self, files, num_classes=None):
        self.files, self.num_classes = files, num_classes

    def __len__(self):
        return len(self.files)

    def read_bytes(self, index):
        return self.files[index]

    def label(self, index):
        return index % self.num_classes if self.num_classes else NO_LABEL

    def name(self, index):
        return f"image {index}"


def write_folder(root, files=FOLDER_FILES):
    for value, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (40 * value,) * 3).save(root / name)
    return root


def write_csv(path, labels, header="file,label"):
    path.write_text("\n".join([header, *(f"{file},{label}" for file, label in labels.items())]) + "\n")
    return str(path)


def write_lsun(folder, kind="WEBP", replace=None):
    """Write a category as LSUN packs it: encoded images under keys of 40 hexadecimal digits."""
    environment = lmdb.open(str(folder), map_size=1 << 22)
    with environment.begin(write=True) as transaction:
        for i in range(LSUN_COUNT):
            data = encode(Image.new("RGB", (20, 16), (20 * i, 0, 0)), kind, quality=95)
            transaction.put(f"{i:040x}".encode(), (replace or {}).get(i, data))
    environment.close()
    return folder


def write_npz(path, images=NPZ_IMAGES, labels=NPZ_LABELS, save=np.savez):
    save(path, images, *([] if labels is None else [labels]))
    return path


def write_shard(path, values, labels=True, suffix="png"):
    """Write images of one grey value each with webdataset; the label is the last digit of the value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, TarWriter(file, encoder=False) as tar:
        for value in values:
            label = {"cls": str(value % 10).encode()} if labels else {}
            tar.write({"__key__": f"{value:06d}", suffix: grey(value), **label})
    return path


def write_shards(folder, count=22, size=5):
    """Write shards of `size` images, the last one shorter."""
    starts = range(0, count, size)
    return [
        write_shard(folder / f"cat-{n:06d}.tar", range(first, min(count, first + size)))
        for n, first in enumerate(starts)
    ]


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path
