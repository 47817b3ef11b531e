"""The numbers of previews: Fréchet distance from the validation images, inception score."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sagl.metrics.distance import FrechetDistance, InceptionScore
from sagl.metrics.extractors import get_extractor
from sagl.metrics.features import Features, extract_features
from sagl.shapes import ImageUint8
from sagl.utils.files import atomic_file, cache_folder


class PreviewMetrics:
    """One extractor's numbers, summed over all processes; what they are compared with is looked at once and kept."""

    def __init__(self, extractor: str, device: torch.device) -> None:
        """With an extractor by its name, under which the sums of real images are kept."""
        self.extract, self.name, self.device = get_extractor(extractor)(device), extractor, device
        self._distance: FrechetDistance | None = None
        self._example: ImageUint8 | None = None

    def update_real(self, batches: Iterable[ImageUint8]) -> None:
        """Take in the real images of this process; from the cache where the same ones were taken in before."""
        if self._distance is not None:
            return
        images = list(batches)
        assert images, "validation has no images"
        self._example = images[0][:1]
        kept = cache_folder() / "statistics" / f"{self.name}-{_fingerprint(images)}.npz"
        if kept.is_file():
            with np.load(kept) as arrays:
                sums = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
            self._distance = FrechetDistance(len(sums["sum"])).to(self.device)
            self._distance.real = sums
            return
        for batch in images:
            features = self._features(batch)
            self._distance = self._distance or FrechetDistance(features.pooled.shape[1]).to(self.device)
            self._distance.update(features.pooled, real=True)
        assert self._distance is not None
        _keep(self._distance.real, kept)

    def of(self, made: Iterable[ImageUint8]) -> dict[str, float]:
        """Numbers of the images that all processes made: frechet, and inception_score where there are logits."""
        distance, score = self._distance, self._score()
        assert distance is not None
        distance.forget_made()
        for images in made:
            features = self._features(images)
            distance.update(features.pooled, real=False)
            if score and features.logits is not None:
                score.update(features.logits)
        found = {"frechet": float(distance.compute())}
        return found | ({"inception_score": float(score.compute())} if score else {})

    def _score(self) -> InceptionScore | None:
        """In every process, those without images too, since all are summed; None without logits."""
        assert self._example is not None
        logits = self._features(self._example).logits
        return None if logits is None else InceptionScore(logits.shape[1]).to(self.device)

    def _features(self, images: ImageUint8) -> Features:
        return extract_features(images.cpu(), self.extract).each(lambda part: part.to(self.device))


def _fingerprint(batches: Iterable[ImageUint8]) -> str:
    """Of the pixels, in their order."""
    digest = hashlib.sha256()
    for images in batches:
        digest.update(images.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _keep(sums: dict[str, Tensor], path: Path) -> None:
    with atomic_file(path, "SAGL_CACHE") as partial, partial.open("wb") as file:
        np.savez(file, **{name: value.cpu().numpy() for name, value in sums.items()})  # type: ignore[arg-type]
