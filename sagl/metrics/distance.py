"""Metrics as torchmetrics has them: fed batch by batch, summed over all processes."""

import torch
from torch import Tensor
from torchmetrics import Metric

from sagl.metrics.frechet import Statistics, frechet_distance
from sagl.metrics.inception_score import score_of, sums_of


class FrechetDistance(Metric):
    """Fréchet distance between two sets of features; the sums that it keeps are (D,) and (D, D) float64 a set.

    Nothing grows with the number of samples, and processes are summed as if one had seen all.
    """

    def __init__(self, width: int) -> None:
        """For features of D = `width` numbers."""
        super().__init__()
        for side in ("real", "made"):
            self.add_state(f"{side}_sum", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_products", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, features: Tensor, *, real: bool) -> None:
        """Add (N, D) features of one of the two sets."""
        features, side = features.double(), "real" if real else "made"
        for name, value in (
            ("sum", features.sum(dim=0)),
            ("products", features.T @ features),
            ("count", torch.tensor(len(features), device=features.device)),
        ):
            setattr(self, f"{side}_{name}", getattr(self, f"{side}_{name}") + value)

    def forget_made(self) -> None:
        """Begin the second set anew; the real one stays."""
        for name in ("sum", "products", "count"):
            setattr(self, f"made_{name}", torch.zeros_like(getattr(self, f"made_{name}")))
        self._computed = None

    def compute(self) -> Tensor:
        """() float64; both sets hold at least 2."""
        return torch.tensor(frechet_distance(self._statistics("real"), self._statistics("made")), dtype=torch.float64)

    @property
    def real(self) -> dict[str, Tensor]:
        """The sums of the real set in this process, to be kept: sum (D,), products (D, D), count ()."""
        return {name: getattr(self, f"real_{name}") for name in ("sum", "products", "count")}

    @real.setter
    def real(self, sums: dict[str, Tensor]) -> None:
        for name, value in sums.items():
            setattr(self, f"real_{name}", value.to(self.device))
        self._update_count += 1

    def _statistics(self, side: str) -> Statistics:
        total, products, count = (getattr(self, f"{side}_{name}") for name in ("sum", "products", "count"))
        mean = total / count
        covariance = (products - count * mean.outer(mean)) / (count - 1)
        return Statistics(mean=mean, covariance=covariance, num_samples=int(count))


class InceptionScore(Metric):
    """The inception score of all images at once; see `sagl.metrics.inception_score`."""

    def __init__(self, classes: int) -> None:
        """For logits of K = `classes` numbers."""
        super().__init__()
        self.probabilities: Tensor
        self.negative_entropy: Tensor
        self.count: Tensor
        self.add_state("probabilities", torch.zeros(classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("negative_entropy", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Add (N, K) logits."""
        probabilities, negative_entropy = sums_of(logits)
        self.probabilities += probabilities
        self.negative_entropy += negative_entropy
        self.count += len(logits)

    def compute(self) -> Tensor:
        """() float64, from 1 to K."""
        score = score_of(self.probabilities, self.negative_entropy, int(self.count))
        return torch.tensor(score, dtype=torch.float64)
