"""Image files and small data sets of every kind that sagl reads."""

import io
import struct
import tarfile

import lmdb
import numpy as np
import pytest
import yaml
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


def contents(folder):
    """Return bytes and modification time of every file below a folder."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def read_png(path):
    """Return (H, W, 3) or (H, W) uint8."""
    with Image.open(path) as image:
        return np.asarray(image)


def write_idx(path, array):
    """Write an array of bytes in the format of MNIST's files."""
    head = struct.pack(">I", 0x800 + array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(head + array.tobytes())


def write_fashion_mnist(root, *, train=200, test=40):
    """Write random images and labels as torchvision stores Fashion-MNIST; return the folder of the files."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        write_idx(raw / f"{split}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(raw / f"{split}-labels-idx1-ubyte", rng.integers(0, 10, count, dtype=np.uint8))
    return raw


def write_fashion_mnist_config(folder, config, *, batch_size=4):
    """Write a configuration of a training and its images; return the path of the configuration."""
    write_fashion_mnist(folder)
    init = {"root": str(folder), "batch_size": batch_size, "num_validation": 8}
    data = {"class_path": "sagl.data.fashion_mnist.FashionMNISTData", "init_args": init}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**config, "data": data}))
    return folder / "tiny.yaml"
