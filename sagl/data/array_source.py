"""Images of arrays as a source of pictures."""

import io
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from PIL import Image

from sagl.data.image_data import Pixels, Source

Array = np.ndarray[Any, np.dtype[Any]]


class ArrayImageSource(Source):
    """Pictures that are not encoded: (N, H, W, 3 or 1) uint8 and (N,) labels."""

    labels: Array

    @property
    @abstractmethod
    def images(self) -> Array:
        """(N, H, W, C) uint8."""

    def __len__(self) -> int:
        """Images in the array."""
        return len(self.labels)

    def encoded(self, index: int) -> bytes:
        """PNG bytes."""
        file = io.BytesIO()
        self.picture(index).save(file, "PNG")
        return file.getvalue()

    def label(self, index: int) -> int:
        """From the array of labels."""
        return int(self.labels[index])

    def picture(self, index: int) -> Image.Image:
        """RGB, or grey where there is one channel."""
        pixels = np.array(self.images[index])
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def pixels(self, index: int, channels: int) -> Pixels:
        """The array's, in colour or in grey."""
        picture = self.picture(index).convert("RGB" if channels == 3 else "L")
        return torch.from_numpy(np.array(picture).reshape(picture.height, picture.width, channels))
