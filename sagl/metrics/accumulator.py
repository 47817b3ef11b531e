"""Accumulation of the features of an image set, batch by batch in a fixed order."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sagl.metrics.features import Features
from sagl.metrics.frechet import CovarianceAccumulator, Statistics


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Statistics of one image set, from which metrics are computed."""

    pooled: Statistics
    """Mean and covariance of the pooled features, for the Fréchet distance."""
    spatial: Statistics | None = None
    """Mean and covariance of the spatial features, for sFID; None if the extractor has none."""
    features: Tensor | None = None
    """(n, D) float32 pooled features of all or of evenly spaced images, for precision, recall and KID."""
    logits: Tensor | None = None
    """(N, K) float32 logits of all images in order, for the inception score."""

    @property
    def num_samples(self) -> int:
        """Number of images of the statistics."""
        return self.pooled.num_samples


@dataclass(kw_only=True)
class FeatureAccumulator:
    """Accumulates features of `total` images; stores `max_features` evenly spaced pooled features."""

    total: int
    max_features: int
    keep_logits: bool
    _pooled: CovarianceAccumulator = field(default_factory=CovarianceAccumulator)
    _spatial: CovarianceAccumulator = field(default_factory=CovarianceAccumulator)
    _features: list[Tensor] = field(default_factory=list)
    _logits: list[Tensor] = field(default_factory=list)

    def add(self, features: Features) -> None:
        """Add the features of the next batch (CPU tensors)."""
        first, n = self._pooled.count, min(self.max_features, self.total)
        index = torch.arange(first, first + len(features.pooled))
        is_kept = (index * n) // self.total != ((index - 1) * n) // self.total  # evenly spaced, starting with 0
        self._features.append(features.pooled[is_kept])
        self._pooled.add(features.pooled)
        if features.spatial is not None:
            self._spatial.add(features.spatial)
        if features.logits is not None and self.keep_logits:
            self._logits.append(features.logits)

    def finalize(self) -> FeatureStatistics:
        """Return the accumulated statistics."""
        return FeatureStatistics(
            pooled=self._pooled.statistics(),
            spatial=self._spatial.statistics() if self._spatial.count else None,
            features=torch.cat(self._features),
            logits=torch.cat(self._logits) if self._logits else None,
        )
