"""What the metrics need of a set of images, gathered a few images at a time and always in the same order."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sagl.metrics.features import Features
from sagl.metrics.frechet import CovarianceAccumulator, Statistics


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """A set of images, as one extractor saw it."""

    pooled: Statistics
    """Of the pooled features, for the Fréchet distance."""
    spatial: Statistics | None = None
    """Of the spatial ones, for sFID; None where the extractor has none."""
    features: Tensor | None = None
    """(n, D) float32 pooled features of all images or of evenly spaced ones, for precision, recall, kernel distance."""
    logits: Tensor | None = None
    """(N, K) float32 of all images, in order, for the inception score."""

    @property
    def num_samples(self) -> int:
        """Images behind the statistics."""
        return self.pooled.num_samples


@dataclass(kw_only=True)
class FeatureAccumulator:
    """Features of a set of `total` images, added in order; as many of the pooled ones are kept as `num_kept` says."""

    total: int
    num_kept: int
    keep_logits: bool
    _sums: CovarianceAccumulator = field(default_factory=CovarianceAccumulator)
    _spatial: CovarianceAccumulator = field(default_factory=CovarianceAccumulator)
    _kept: list[Tensor] = field(default_factory=list)
    _logits: list[Tensor] = field(default_factory=list)

    def add(self, features: Features) -> None:
        """Of the next images, in memory of the CPU."""
        first = self._sums.count
        places = torch.arange(first, first + len(features.pooled))
        kept = min(self.num_kept, self.total)
        chosen = (places * kept) // self.total != (
            (places - 1) * kept
        ) // self.total  # evenly spaced, the first one too
        self._kept.append(features.pooled[chosen])
        self._sums.add(features.pooled)
        if features.spatial is not None:
            self._spatial.add(features.spatial)
        if features.logits is not None and self.keep_logits:
            self._logits.append(features.logits)

    def done(self) -> FeatureStatistics:
        """All of it."""
        return FeatureStatistics(
            pooled=self._sums.statistics(),
            spatial=self._spatial.statistics() if self._spatial.count else None,
            features=torch.cat(self._kept),
            logits=torch.cat(self._logits) if self._logits else None,
        )
