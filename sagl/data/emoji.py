"""Emoji of seven icon families as 32x32 RGB images on white, rendered from Iconify's npm packages.

All images of an emoji belong to the same split, whatever their family.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sagl.data.emoji_icons import CATEGORIES, FAMILIES, Icon, digest, read_icons, select_variants
from sagl.data.image_data import Array
from sagl.data.in_memory import InMemoryData, InMemoryImages
from sagl.errors import UserError, require
from sagl.shapes import ImageUint8
from sagl.utils.files import cache_file, cache_folder

SIZE = 32
TEST_PERCENT = 10
"""Expected percentage of the emoji in the test split."""
MAX_WHITE_FRACTION = 0.95
"""Largest fraction of nearly white pixels in an image."""
TEST_IMAGES = Path(__file__).with_name("emoji_test.npz")
"""The test split with two variants per family and the versions of `FAMILIES`: (689, 32, 32, 3), in the package."""
CACHE_VERSION = 1
"""Version of the rendering, a part of the cache file's name. Increase it when the images change."""


@dataclass(kw_only=True, eq=False)
class EmojiData(InMemoryData):
    """Data module of emoji labelled by category. Batches are ((B, 3, 32, 32) uint8, (B,) int64)."""

    root: str | None = None
    """Folder in which npm installed the icon packages; by default `emoji` in the cache folder."""
    num_validation: int = 400
    """Validation images: the first of the test split. The others are the test images."""
    max_variants: int = 2
    """Largest number of variants (skin tones, genders) of an emoji per icon family."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_variants >= 1, f"`data.max_variants` must be at least 1, got {self.max_variants}.")

    @property
    def folder(self) -> Path:
        """Folder that contains node_modules."""
        return Path(self.root) if self.root else cache_folder() / "emoji"

    def prepare_data(self) -> None:
        prepare_emoji(self.folder, self.max_variants)

    def split(self, *, test: bool) -> InMemoryImages:
        with np.load(prepare_emoji(self.folder, self.max_variants)) as arrays:
            images, labels = (torch.from_numpy(arrays[name][arrays["test"] == test]) for name in ("images", "labels"))
        return InMemoryImages(images, labels)


def read_split(*, train: bool, argument: str) -> tuple[ImageUint8, str]:
    """Return the images of a split with the default settings, and a version that changes with the training images.

    Args:
        train: the training split, of the packages in the cache folder, or else the test split in this package.
        argument: name of the argument in messages.

    Raises:
        UserError: the packages for the training split are not installed.
    """
    if not train:
        return torch.from_numpy(np.load(TEST_IMAGES)["arr_0"]).permute(0, 3, 1, 2).contiguous(), ""
    data = EmojiData()
    path = prepare_emoji(data.folder, data.max_variants, argument)
    return data.split(test=False).images, path.stem


def prepare_emoji(root: Path, max_variants: int, argument: str = "data.root") -> Path:
    """Return the npz file of all images in the cache folder; render it first if it does not exist.

    Arrays: images (N, 3, 32, 32) uint8; labels (N,) int64; test (N,) bool; family, name and emoji (N,) str. The order
    is random, so that the first images of the test split are of all families and categories.

    Raises:
        UserError: a package or the renderer is not installed; names `argument`.
    """
    packages = {family: root / "node_modules" / "@iconify-json" / family for family in FAMILIES}
    missing = [family for family, folder in packages.items() if not (folder / "icons.json").is_file()]
    names = " ".join(f"@iconify-json/{family}@{version}" for family, version in FAMILIES.items())
    require(
        not missing,
        f"`{argument}` needs a folder with the npm packages of the emoji, and {root} lacks {', '.join(missing)}. "
        f"Install them with: mkdir -p {root} && cd {root} && npm install {names}",
    )
    versions = [json.loads((folder / "package.json").read_text())["version"] for folder in packages.values()]
    key = json.dumps([CACHE_VERSION, SIZE, TEST_PERCENT, list(packages), versions, max_variants])
    path = cache_folder() / f"emoji-{digest(key)[:12]}.npz"
    if not path.exists():
        arrays = render_icons(select_variants(read_icons(packages), max_variants))
        with cache_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
    return path


def render_icons(icons: list[Icon]) -> dict[str, Array]:
    """Return the arrays of `prepare_emoji`, without duplicates and nearly white images.

    Of two equal images in different splits, the one of the test split is kept.
    """
    order = sorted(icons, key=lambda i: (not in_test_split(i.emoji), digest(f"{i.emoji} {i.family} {i.name}")))
    icon_of: dict[bytes, Icon] = {}
    for icon in order:
        image = render(icon.svg)
        if (image.min(axis=-1) > 240).mean() <= MAX_WHITE_FRACTION:
            icon_of.setdefault(image.tobytes(), icon)
    images, unique_icons = np.frombuffer(b"".join(icon_of), np.uint8).reshape(-1, SIZE, SIZE, 3), list(icon_of.values())
    return {
        "images": np.ascontiguousarray(images.transpose(0, 3, 1, 2)),
        "labels": np.array([CATEGORIES.index(icon.category) for icon in unique_icons], dtype=np.int64),
        "test": np.array([in_test_split(icon.emoji) for icon in unique_icons], dtype=bool),
        **{field: np.array([getattr(icon, field) for icon in unique_icons]) for field in ("family", "name", "emoji")},
    }


def render(svg: str) -> Array:
    """Render an SVG document on white, (32, 32, 3) uint8.

    Raises:
        UserError: resvg_py is not installed.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise UserError("`data` needs resvg_py to render emoji. Install it with: pip install 'sagl[emoji]'") from error
    png = svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True)
    return np.array(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def in_test_split(emoji: str) -> bool:
    """Return whether an emoji is in the test split, which depends on its name alone."""
    return int(digest(emoji), 16) % 100 < TEST_PERCENT
