"""Features of image sets, extracted by all processes of a command."""

import sys
from dataclasses import dataclass

import torch

from sagl.evaluation.image_sets import ImageSet, describe_unreadable, require_few_unreadable
from sagl.metrics.accumulator import FeatureAccumulator, FeatureStatistics
from sagl.metrics.extractors import extractor_version, get_extractor
from sagl.metrics.features import Extractor, Features, check_features
from sagl.settings.evaluation import ExtractionSettings
from sagl.shapes import ImageUint8
from sagl.utils.distributed import Ranks
from sagl.utils.prefetch import prefetch
from sagl.utils.progress import ProgressReporter


@dataclass(frozen=True, kw_only=True)
class FeatureExtraction:
    """An extractor on the devices of all ranks. Its methods must be called by all ranks in the same order."""

    name: str
    """Name of the extractor."""
    version: str = ""
    """Text that differs for other weights or code under this name, see `extractor_version`."""
    extract: Extractor
    ranks: Ranks
    settings: ExtractionSettings

    @classmethod
    def load(cls, name: str, settings: ExtractionSettings, ranks: Ranks) -> "FeatureExtraction":
        """Load an extractor by its name.

        Raises:
            UserError: there is no such extractor, or its packages or weights are missing.
        """
        extract = get_extractor(name)(ranks.device)
        version = extractor_version(name, extract)
        return cls(name=name, version=version, extract=extract, ranks=ranks, settings=settings)

    def statistics(
        self, images: ImageSet, num_samples: int, *, max_features: int, title: str, keep_logits: bool = False
    ) -> FeatureStatistics | None:
        """Extract features of the first images of a set, and return their statistics on rank 0, None on the others.

        Rank r processes batches r, r + world size, …. Rank 0 adds them in their order, so that the statistics do
        not depend on the number of ranks.

        Args:
            images: the same set on all ranks.
            num_samples: number of images, at least 2.
            max_features: maximum number of features to store.
            title: title of the progress.
            keep_logits: whether to store all logits.

        Raises:
            UserError: too many images are damaged, or the extractor returns no features.
        """
        accumulator = FeatureAccumulator(total=num_samples, max_features=max_features, keep_logits=keep_logits)
        ranks, batch_size = self.ranks, self.settings.batch_size
        kind = self.settings.progress if ranks.rank == 0 else "off"
        starts = range(ranks.rank * batch_size, num_samples, batch_size * ranks.world_size)
        batches = prefetch(_read(images, start, min(num_samples, start + batch_size)) for start in starts)
        unreadable: list[str] = []
        with ProgressReporter(f"{self.name} of {title}", num_samples, kind) as progress:
            for _ in range(0, num_samples, batch_size * ranks.world_size):
                batch, new_names = next(batches, (None, []))
                for features, names in ranks.gather((self._features(batch), new_names)):
                    unreadable += names
                    require_few_unreadable(unreadable, num_samples)
                    if features is not None:
                        accumulator.add(features)
                        progress.advance(len(features.pooled))
        if unreadable:
            note = describe_unreadable(num_samples, num_samples - len(unreadable))
            print(f"{title}: {note} The first of them is {unreadable[0]}.", file=sys.stderr)
        return accumulator.finalize() if ranks.rank == 0 else None

    def _features(self, batch: ImageUint8 | None) -> Features | None:
        if batch is None or len(batch) == 0:
            return None
        with torch.inference_mode():
            return check_features(self.extract(batch), len(batch))


def _read(images: ImageSet, start: int, stop: int) -> tuple[ImageUint8, list[str]]:
    """Return some images and the names of those that cannot be decoded."""
    num_unreadable = len(images.unreadable)
    return images.read(start, stop), list(images.unreadable[num_unreadable:])
