"""Decoding, resizing and cropping of images, as ADM does it (Dhariwal & Nichol 2021)."""

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor

Pixels = Tensor
"""(H, W, C) uint8."""
MIN_CROP_FRACTION = 0.8
"""Smallest side of a random crop, as a fraction of the image's shorter side."""
_RGB = getattr(getattr(torchvision.io, "ImageReadMode", None), "RGB", None)
"""Read mode of torchvision's decoder; None for versions without a decoder (it is deprecated)."""
Image.MAX_IMAGE_PIXELS = 1 << 30
"""Pixels at which Pillow warns of a decompression bomb; at twice as many it refuses. Its own limit of 89 million is
less than whole-slide and satellite images have."""
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"


@dataclass(frozen=True, kw_only=True)
class CropResize:
    """Transform of an image of any size into a square."""

    image_size: int
    """Side of the square in pixels."""
    channels: int
    """3 for RGB, 1 for greyscale."""
    random_crop: bool = False
    """Crop at a random position, at 80 to 100 % of the shorter side, rather than the largest square at the centre."""
    random_flip: bool = False
    """Flip horizontally with probability 0.5."""

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """Return (image_size, image_size, C); random crops and flips are drawn from `rng`."""
        size = self.image_size
        shorter_side = int(rng.integers(size, int(size / MIN_CROP_FRACTION) + 1)) if self.random_crop else size
        pixels = resize_shorter_side(pixels, shorter_side)
        margins = (pixels.shape[1] - size, pixels.shape[0] - size)
        left, top = (int(rng.integers(margin + 1)) if self.random_crop else margin // 2 for margin in margins)
        square = pixels[top : top + size, left : left + size]
        return square.flip(1) if self.random_flip and rng.random() < 0.5 else square


def resize_shorter_side(pixels: Pixels, size: int) -> Pixels:
    """Resize an image so that its shorter side has `size` pixels.

    The image is halved by 2x2 means while its shorter side is at least twice `size`, then resized bicubically.
    """
    if min(pixels.shape[:2]) == size:
        return pixels
    image = Image.fromarray(pixels.numpy() if pixels.shape[2] == 3 else pixels[:, :, 0].numpy())
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return to_pixels(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC))


def decode_image(data: bytes, channels: int) -> Pixels:
    """Decode an image file to (H, W, channels): JPEG to RGB with torchvision, which is faster, the rest with Pillow.

    The image is turned upright as its EXIF orientation says; of an animation, the first frame is taken.

    Raises:
        Exception: the data are corrupt; Pillow raises many types.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's decoder is deprecated; Pillow warns of EXIF data and palettes
        # torchvision fills a truncated JPEG with grey, so the end marker is required.
        if _RGB and channels == 3 and data[:2] == _JPEG_START and data[-2:] == _JPEG_END:
            with suppress(RuntimeError):
                jpeg = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                return torchvision.io.decode_jpeg(jpeg, _RGB, apply_exif_orientation=True).permute(1, 2, 0)
        image = Image.open(io.BytesIO(data))
        image.load()
        with suppress(Exception):  # for unreadable EXIF data, Pillow raises many types
            ImageOps.exif_transpose(image, in_place=True)
        return to_pixels(image, channels)


def to_pixels(image: Image.Image, channels: int | None = None) -> Pixels:
    """Return a Pillow image as (H, W, C), converted to RGB (`channels` 3) or greyscale (1) if `channels` is given.

    Of 16 bits, the upper 8 are taken, as Pillow does for colour images. Transparency is dropped.

    Raises:
        ValueError: the image has 32 bits per channel, whose range is not known.
    """
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits per channel; save it with 8 or 16")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    converted = image if channels is None else image.convert("RGB" if channels == 3 else "L")
    return torch.from_numpy(np.array(converted).reshape(image.height, image.width, -1))
