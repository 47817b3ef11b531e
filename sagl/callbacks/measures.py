"""Metrics of previews: Fréchet distance from the validation images, and inception score."""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch

from sagl.metrics.extractors import get_extractor
from sagl.metrics.feature_metrics import FeatureMetrics
from sagl.shapes import ImageUint8
from sagl.utils.files import atomic_file, cache_folder


class PreviewMetrics:
    """Metrics of one extractor over all processes; statistics of the real images are cached by their pixels."""

    def __init__(self, extractor: str, device: torch.device) -> None:
        """Load the extractor of this name."""
        self._extract, self._name, self._device = get_extractor(extractor)(device), extractor, device
        self._metrics: FeatureMetrics | None = None

    def update_real(self, batches: Iterable[ImageUint8]) -> None:
        """Accumulate features of the real images of this process once, or load them from the cache."""
        if self._metrics is not None:
            return
        images = [batch.cpu() for batch in batches]
        assert images, "validation has no images"
        self._metrics = FeatureMetrics(self._extract, images[0][:1], self._device)
        path = cache_folder() / "statistics" / f"preview-{self._name}-{_fingerprint(images)}.npz"
        if path.is_file():
            with np.load(path) as arrays:
                self._metrics.real_state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
            return
        for batch in images:
            self._metrics.update_real(batch)
        state = {name: value.cpu().numpy() for name, value in self._metrics.real_state.items()}
        with atomic_file(path, "SAGL_CACHE") as partial, partial.open("wb") as file:
            np.savez(file, **state)  # type: ignore[arg-type]

    def compute(self, batches: Iterable[ImageUint8]) -> dict[str, float]:
        """Compute the metrics of the generated images of all processes: frechet and, with logits, inception_score."""
        assert self._metrics is not None
        return self._metrics.compute(batches)


def _fingerprint(batches: Iterable[ImageUint8]) -> str:
    """Compute a SHA-256 of the pixels."""
    digest = hashlib.sha256()
    for images in batches:
        digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
