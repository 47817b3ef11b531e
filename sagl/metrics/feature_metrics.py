"""FID and inception score by torchmetrics during training, from features that one extractor computes for both."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from sagl.metrics.features import Extractor, Features, concatenate, extract_features
from sagl.shapes import ImageUint8

REAL_STATE = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")
"""States of torchmetrics' FID that belong to the real images."""


class FeatureMetrics:
    """Fréchet distance from real images, and inception score if the extractor has logits.

    torchmetrics sums the states of all processes in `compute`. Features are passed to it in float64.
    """

    def __init__(self, extract: Extractor, example: ImageUint8, device: torch.device) -> None:
        """Create the metrics.

        Args:
            extract: the feature extractor.
            example: (1, C, H, W) uint8, from whose features the number of dimensions and of classes is taken.
            device: device of the states.
        """
        self._extract, self._device = extract, device
        features = self._features(example)
        self._empty = features.map(lambda part: part[:0])
        self._fid = FrechetInceptionDistance(Identity(features.pooled.shape[1]), reset_real_features=False).to(device)
        self._inception_score: InceptionScore | None = None
        if features.logits is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Metric `InceptionScore` will save all extracted features")
                self._inception_score = InceptionScore(Identity(features.logits.shape[1]), splits=1).to(device)

    @property
    def real_state(self) -> dict[str, Tensor]:
        """Sums over the real images of this process: sum (D,), products (D, D) and count ()."""
        return {name: getattr(self._fid, name) for name in REAL_STATE}

    @real_state.setter
    def real_state(self, state: dict[str, Tensor]) -> None:
        for name in REAL_STATE:
            setattr(self._fid, name, state[name].to(self._device))

    def update_real(self, images_uint8: ImageUint8) -> None:
        """Add a batch of real images of this process."""
        self._fid.update(self._features(images_uint8).pooled, real=True)

    def compute(self, fake_batches: Iterable[ImageUint8]) -> dict[str, float]:
        """Compute `frechet` and, with logits, `inception_score` of the generated images of all processes.

        Args:
            fake_batches: the images of this process, which may be none.
        """
        features = concatenate([self._empty, *map(self._features, fake_batches)])
        self._fid.update(features.pooled, real=False)
        results = {"frechet": float(self._fid.compute())}
        self._fid.reset()  # the real images stay
        if self._inception_score is not None and features.logits is not None:
            self._inception_score.update(features.logits)
            # torchmetrics permutes the images by the global generator, and takes a deviation over its single split
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="std")
                results["inception_score"] = float(self._inception_score.compute()[0])
            self._inception_score.reset()
        return results

    def _features(self, images_uint8: ImageUint8) -> Features:
        features = extract_features(images_uint8.cpu(), self._extract)
        return features.map(lambda part: part.to(self._device, torch.float64))


class Identity(nn.Identity):
    """A feature extractor for torchmetrics that returns its input, (N, num_features)."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
