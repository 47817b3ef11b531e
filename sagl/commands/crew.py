"""Features of many images by many processes: micro-batches in turn, gathered by the first one in their own order.

The j-th round's i-th process looks at micro-batch j · world size + i, so that what the first process hears, and in
which order, does not depend on how many they are.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import distributed

from sagl.commands.spread import LONGEST
from sagl.errors import UserError
from sagl.evaluation.image_sets import ImageSet
from sagl.metrics.accumulator import FeatureAccumulator, FeatureStatistics
from sagl.metrics.features import Extractor, Features, check_features
from sagl.settings.sampling import DeviceSettings
from sagl.utils.distributed import num_processes, select_device
from sagl.utils.environment import set_threads
from sagl.utils.progress import ProgressReporter

Word = TypeVar("Word")


class Crew:
    """The processes of one evaluation; alone, a single one."""

    rank, world_size = 0, 1

    def told(self, word: Word | None) -> Word:
        """What the first process says, in all of them."""
        assert word is not None
        return word

    def gathered(self, word: Word) -> list[Word]:
        """What each process says, in order of ranks; the others hear nothing of use."""
        return [word]


class Many(Crew):
    """Several processes; their words go through memory, wherever they compute."""

    def __init__(self, rank: int, world_size: int) -> None:
        """Of a process group that is there."""
        self.rank, self.world_size = rank, world_size
        group = distributed.new_group(backend="gloo", timeout=LONGEST)
        assert isinstance(group, distributed.ProcessGroup)
        self._group = group

    def told(self, word: Word | None) -> Word:
        """Broadcast."""
        words = [word]
        distributed.broadcast_object_list(words, src=0, group=self._group)
        assert words[0] is not None
        return words[0]

    def gathered(self, word: Word) -> list[Word]:
        """Gather."""
        words: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        distributed.gather_object(word, words, dst=0, group=self._group)
        return words or []


@contextmanager
def crew_of(s: DeviceSettings) -> Iterator[Crew]:
    """The processes of this command, started here or beside this one."""
    processes, in_all = num_processes(s)
    set_threads(processes)
    if in_all == 1:
        yield Crew()
        return
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's own use of torch
    plugins: list[Any] = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    fabric = Fabric(
        accelerator="gpu" if select_device(s).type == "cuda" else "cpu",
        devices=processes,
        num_nodes=s.num_nodes,
        strategy=DDPStrategy(timeout=LONGEST),
        plugins=plugins,
    )
    fabric.launch()
    try:
        yield Many(fabric.global_rank, fabric.world_size)
    finally:
        distributed.destroy_process_group()


def looked_at(
    images: ImageSet,
    wanted: int,
    extract: Extractor,
    crew: Crew,
    *,
    batch_size: int,
    max_features: int,
    watch: ProgressReporter,
) -> FeatureStatistics | None:
    """The first `wanted` images of a set, as the extractor sees them; None in all but the first process.

    Args:
        images: the same set in every process.
        wanted: at least 2.
        extract: the extractor.
        crew: that shares the work.
        batch_size: images at a time.
        max_features: features to keep, at least.
        watch: is told of images that are done.

    Raises:
        UserError: an image is damaged; in all processes.
    """
    tally = FeatureAccumulator(total=wanted, max_features=max_features, keep_logits=max_features >= wanted)
    starts = range(0, wanted, batch_size)
    for first in range(0, len(starts), crew.world_size):
        mine = first + crew.rank
        found: Features | str | None = None
        if mine < len(starts):
            found = _features(images, starts[mine], min(wanted, starts[mine] + batch_size), extract)
        heard = crew.gathered(found)
        refused = crew.told(next((word for word in heard if isinstance(word, str)), ""))
        if refused:
            raise UserError(refused)
        for features in heard:
            if isinstance(features, Features):
                tally.add(features)
                watch.images(len(features.pooled))
    return tally.finalize() if crew.rank == 0 else None


def _features(images: ImageSet, start: int, stop: int, extract: Extractor) -> Features | str:
    """Of some images; or what is wrong with them."""
    try:
        pictures = images.images(start, stop)
    except UserError as error:
        return str(error)
    with torch.inference_mode():
        return check_features(extract(pictures), len(pictures))
