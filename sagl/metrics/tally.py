"""What the metrics need of a set of images, gathered a few images at a time and always in the same order."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sagl.metrics.features import Features
from sagl.metrics.frechet import Statistics


@dataclass(frozen=True, kw_only=True)
class Looked:
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


class Sums:
    """Mean and covariance of features that come in parts; float64, from the first part's mean to keep the digits."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self.count, self._parts = 0, 0
        self._near: Tensor
        self._total: Tensor
        self._products: Tensor

    def add(self, features: Tensor) -> None:
        """Add (n, D) features."""
        features = features.double()
        if self.count == 0:
            self._near = features.mean(dim=0)
            self._total = torch.zeros_like(self._near)
            self._products = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
        off = features - self._near
        self._total += off.sum(dim=0)
        self._products.addmm_(off.T, off)
        self.count += len(features)

    def statistics(self) -> Statistics:
        """Of all that was added, at least 2."""
        mean = self._total / self.count
        covariance = self._products.sub(mean.outer(mean), alpha=self.count) / (self.count - 1)
        return Statistics(mean=self._near + mean, covariance=covariance, num_samples=self.count)


@dataclass(kw_only=True)
class Tally:
    """Features of a set of `total` images, added in order; as many of the pooled ones are kept as `num_kept` says."""

    total: int
    num_kept: int
    keep_logits: bool
    _sums: Sums = field(default_factory=Sums)
    _spatial: Sums = field(default_factory=Sums)
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

    def done(self) -> Looked:
        """All of it."""
        return Looked(
            pooled=self._sums.statistics(),
            spatial=self._spatial.statistics() if self._spatial.count else None,
            features=torch.cat(self._kept),
            logits=torch.cat(self._logits) if self._logits else None,
        )
