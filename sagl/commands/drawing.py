"""Images of a run, a micro-batch at a time, each on the disk before the next begins."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sagl.commands.job import Job, read_source
from sagl.errors import require
from sagl.sampling.run_folder import SAMPLES, Sample, is_run, png, remove_superseded, write_run_json, write_shard
from sagl.utils.distributed import select_device
from sagl.utils.progress import ProgressReporter

if TYPE_CHECKING:  # torch is imported once the command line has been accepted
    from sagl.sampling.pipeline import SamplingPipeline
    from sagl.shapes import Image, ImageUint8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all processes of a run are told."""

    job: Job
    missing: Sequence[Sequence[int]]
    """Ids wanted of each micro-batch that is to be made."""
    record: dict[str, Any]
    """run.json as it is to be when the first images are there."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One process's work on a plan."""

    plan: Plan
    recipe: "SamplingPipeline"
    watch: ProgressReporter
    processes: int = 1
    """That share the plan."""

    def make(self, wanted: Sequence[int]) -> None:
        """Make one micro-batch, which is on the disk when this returns.

        Raises:
            UserError: the images overflowed, or cannot be written.
        """
        folder = self.plan.job.folder
        samples = _micro_batch(self.plan.job, self.recipe, wanted, self.watch)
        if not is_run(folder):  # not before there is something to record
            write_run_json(folder, self.plan.record)
        write_shard(folder, samples)

    def lead(self, wanted: Sequence[int]) -> None:
        """The same, and run.json says how long all processes have worked. For the first process alone.

        Raises:
            UserError: as above.
        """
        started = time.monotonic()
        self.make(wanted)
        remove_superseded(self.plan.job.folder)
        seconds = (time.monotonic() - started) * self.processes
        self.plan.record["seconds"] = round(self.plan.record["seconds"] + seconds, 2)
        write_run_json(self.plan.job.folder, self.plan.record)


def recipe_of(job: Job) -> "SamplingPipeline":
    """The weights and settings of a job, put together on this process's device.

    Raises:
        UserError: they do not go together.
    """
    from sagl.models.checkpoints import build_network, cast_weights
    from sagl.sampling.pipeline import build_pipeline

    request = job.request
    file, device = read_source(request.source, job.weights), select_device(request.device)
    network = cast_weights(build_network(file), request.weight_precision, device)
    if request.device.compile:
        network.compile(dynamic=False)  # every micro-batch has the same size
    return build_pipeline(network, file.diffusion, request.chain, request.guidances)


def _micro_batch(job: Job, recipe: "SamplingPipeline", wanted: Sequence[int], watch: ProgressReporter) -> list[Sample]:
    """The samples wanted of one micro-batch, which is always computed at full size."""
    import torch

    from sagl.sampling.pipeline import make_labels, run_to_end
    from sagl.utils.images import to_uint8

    size = job.run.effective_batch_size
    first = wanted[0] - wanted[0] % size
    ids = list(range(first, first + size))
    with torch.inference_mode():
        labels = make_labels(job.run, ids, recipe.network)
        rows: dict[str, ImageUint8] = {}
        if job.request.compare:
            chain = recipe.unguided.sample_progressive(job.run.seed, ids, labels)
            rows["unguided"] = to_uint8(_finite(run_to_end(watch.steps(chain, recipe.schedule.num_steps))[0]))
        x, share = run_to_end(
            watch.steps(recipe.sample_progressive(job.run.seed, ids, labels), recipe.schedule.num_steps)
        )
        rows[SAMPLES] = to_uint8(_finite(x))
        if job.request.compare and share is not None:
            rows["masks"] = (share * 255).round().to(torch.uint8)
    listed = [-1] * size if labels is None else labels.tolist()
    pictures = {name: _pngs(row, wanted[0] - first, len(wanted)) for name, row in rows.items()}
    return [
        Sample(id=i, label=listed[i - first], seed=job.run.seed, pictures={n: p[k] for n, p in pictures.items()})
        for k, i in enumerate(wanted)
    ]


def _finite(images: "Image") -> "Image":
    """The images, unless they overflowed: no black or torn ones are kept."""
    require(
        bool(images.isfinite().all()),
        "`sag.scale`, `cfg.scale` and `classifier.scale` must leave the images finite, and here they overflowed. "
        "Lower them, or give --trainer.precision 32-true.",
    )
    return images


def _pngs(row: "ImageUint8", start: int, count: int) -> list[bytes]:
    from sagl.utils.images import to_rgb

    return [png(image) for image in to_rgb(row[start : start + count]).permute(0, 2, 3, 1).cpu().contiguous().numpy()]
