"""Rows of images on the page: sampled in a thread, shown step by step, and kept for the next request."""

import json
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Event, Thread

from sagl.diffusion.predictor import Trajectory
from sagl.errors import UserError, require
from sagl.guidance.base import Guidance
from sagl.models.adm import UNet
from sagl.playground.networks import LoadedNetworks, without_networks
from sagl.playground.steps import StepRecord, record_steps
from sagl.sampling.batch import BatchImages, encode_pngs, sample_images
from sagl.sampling.exports import evenly_spaced_steps
from sagl.sampling.guidance_files import guidance_files
from sagl.sampling.pipeline import SamplingPipeline, build_pipeline
from sagl.sampling.run import SampleConfig, SamplingRun
from sagl.settings.diffusion import DiffusionSettings
from sagl.utils.environment import refuse_out_of_memory
from sagl.utils.files import file_version
from sagl.utils.images import to_uint8

MAX_STEPS = 25
"""Steps of a chain that are kept for the page; of longer chains, evenly spaced ones."""
MAX_ROWS = 16
"""Number of the last rows that are kept."""
NOT_KEPT = "These images are not kept any more. Sample again."
"""Answer to a request for images that were dropped, or whose network was."""
MEMORY_ADVICE = "Fewer guidance methods with networks of their own need less, too. "


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A row while it is sampled."""

    images: Sequence[bytes]
    """PNG files: the finished samples, and x0_hat of the current batch."""
    steps_done: int
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """Images of equal settings, and the steps that made them."""

    run: SamplingRun
    key: str
    """Text that is equal for rows of equal settings and weights."""
    versions: Mapping[str, bytes]
    """Versions of the weight files, by parameter, before they were read."""
    network: "weakref.ref[UNet]"
    """The network, while its `RowSampler` keeps it. A page that shows the row must not hold the memory of a GPU."""
    guidances: Mapping[str, Guidance]
    """Guidances without their networks, for the cost of a run."""
    diffusion: DiffusionSettings
    batches: Sequence[BatchImages]
    chains: Sequence[Sequence[StepRecord]]
    """Steps of each batch."""
    seconds: Sequence[float]
    """Duration of each batch."""

    @property
    def images(self) -> list[bytes]:
        """PNG files."""
        return [png for batch in self.batches for png in batch.images]

    @property
    def masks(self) -> list[bytes]:
        """PNG files of the mask frequencies; empty without masks."""
        return [png for batch in self.batches for png in batch.masks or ()]

    @property
    def ids(self) -> list[int]:
        """Ids of the samples."""
        return [i for batch in self.batches for i in batch.ids]

    @property
    def labels(self) -> list[int]:
        """Classes; -1 for none."""
        return [label for batch in self.batches for label in batch.labels]

    @property
    def nfe(self) -> float:
        """Network evaluations per sample."""
        return sum(batch.nfe for batch in self.batches) / len(self.batches)

    @property
    def is_kept(self) -> bool:
        """True until another network is loaded."""
        return self.network() is not None

    @property
    def pipeline(self) -> SamplingPipeline:
        """The pipeline of the row, for its cost and for the network; its guidances have no networks to sample with.

        Raises:
            UserError: another network was loaded since.
        """
        network = self.network()
        if network is None:
            raise UserError(NOT_KEPT)
        pipeline = build_pipeline(network, self.diffusion, self.run.config.sampler, checkpoint=self.run.checkpoint)
        return replace(pipeline, guidances=self.guidances)

    def check_files(self) -> None:
        """Check that the weight files are still those of the images.

        Raises:
            UserError: one was replaced or removed.
        """
        for name, version in file_versions(self.run).items():
            require(
                self.versions[name] == version,
                f"`{name}` must be the file that these images were sampled with, and it was replaced. Sample again.",
            )

    def find(self, sample_id: int) -> tuple[Sequence[StepRecord], int]:
        """Return the chain of a sample, and its position in the batch."""
        for batch, chain in zip(self.batches, self.chains, strict=True):
            if sample_id in batch.ids:
                return chain, batch.ids.index(sample_id)
        raise KeyError(sample_id)


class RowSampler:
    """Samples rows, one at a time; keeps the last network, the last networks that guide it, and its last rows."""

    def __init__(self) -> None:
        self._networks = LoadedNetworks()
        self._rows: OrderedDict[str, Row] = OrderedDict()

    def sample(self, config: SampleConfig) -> Iterator[Frame | Row]:
        """Yield frames while a row is sampled, and the row at last; at once if it was sampled before.

        A thread samples. If the iterator is closed, the thread ends after its current step.

        Raises:
            UserError: the request cannot be met.
        """
        active = {name: guidance for name, guidance in config.guidances.items() if guidance.scale}
        run = SamplingRun.without_folder(replace(config, guidances=active, compare=False))
        parameter = "num_samples" if config.samples.batch_size is None else "batch_size"
        versions = file_versions(run)
        key = _row_key(run, versions)
        if key in self._rows:
            self._rows.move_to_end(key)
            yield self._rows[key]
            return
        updates: SimpleQueue[Frame | Row | BaseException] = SimpleQueue()
        stop = Event()
        thread = Thread(target=self._sample, args=(run, versions, parameter, updates.put, stop), daemon=True)
        thread.start()
        update: Frame | Row | BaseException | None = None
        try:
            while not isinstance(update := updates.get(), Row):
                if isinstance(update, BaseException):
                    raise update
                yield update
            self._rows[key] = update
            if len(self._rows) > MAX_ROWS:
                self._rows.popitem(last=False)
            yield update
        finally:
            stop.set()
            thread.join()
            update = None  # an error would be kept by its own traceback, and with it the tensors of the step
            self._rows = OrderedDict((key, row) for key, row in self._rows.items() if row.is_kept)

    def _sample(
        self,
        run: SamplingRun,
        versions: Mapping[str, bytes],
        parameter: str,
        put: Callable[[Frame | Row | BaseException], None],
        stop: Event,
    ) -> None:
        try:
            with refuse_out_of_memory(parameter, MEMORY_ADVICE):
                put(_sample_row(run, versions, self._networks.build_pipeline(run), put, stop))
        except BaseException as error:  # it belongs to the thread that waits for the row
            put(error)


def _sample_row(
    run: SamplingRun,
    versions: Mapping[str, bytes],
    pipeline: SamplingPipeline,
    put: Callable[[Frame], None],
    stop: Event,
) -> Row:
    """Sample all batches of a row; pass a frame to `put` after every step.

    Raises:
        InterruptedError: `stop` is set.
    """
    batches: list[BatchImages] = []
    chains: list[list[StepRecord]] = []
    seconds: list[float] = []
    samples, num_batches = run.config.samples, len(run.config.batches)

    def track_steps(steps: Trajectory, num_steps: int) -> Trajectory:
        """Yield the steps of a batch; put a frame for each, and keep the records of the steps that are shown."""
        ids, finished = run.config.batches[len(batches)], [png for batch in batches for png in batch.images]
        kept = evenly_spaced_steps(num_steps, MAX_STEPS)
        records = record_steps(pipeline, samples, ids, run.config.guidances, steps)
        for done, (record, step) in enumerate(records, start=len(batches) * num_steps + 1):
            if stop.is_set():
                raise InterruptedError
            chains[-1] += [record] if record.step in kept else []
            images = [*finished, *encode_pngs(to_uint8(record.x0_hat.float()))]
            put(Frame(images=images, steps_done=done, num_steps=num_batches * num_steps))
            yield step

    for ids in run.config.batches:
        start = time.monotonic()
        chains.append([])
        batches.append(sample_images(pipeline, samples, ids, track_steps))
        seconds.append(time.monotonic() - start)
    return Row(
        run=run,
        key=_row_key(run, versions),
        versions=versions,
        network=weakref.ref(pipeline.network),
        guidances={name: without_networks(guidance) for name, guidance in pipeline.guidances.items()},
        diffusion=pipeline.diffusion,
        batches=batches,
        chains=chains,
        seconds=seconds,
    )


def file_versions(run: SamplingRun) -> dict[str, bytes]:
    """Return the versions of the weight files of the network and of its guidance, by parameter.

    Raises:
        UserError: a file does not exist.
    """
    require(run.checkpoint.is_file(), f"`checkpoint` must be a file, and {run.checkpoint} does not exist any more.")
    files = {"checkpoint": run.checkpoint, **guidance_files(run.config.guidances, run.checkpoint)}
    return {name: file_version(path) for name, path in files.items()}


def _row_key(run: SamplingRun, versions: Mapping[str, bytes]) -> str:
    samples = run.config.samples
    settings = [run.config.image_settings, samples.num_samples, samples.batch_size, repr(run.config.source.network)]
    return json.dumps([{name: repr(version) for name, version in versions.items()}, *settings], sort_keys=True)
