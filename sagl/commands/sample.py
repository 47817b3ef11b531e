"""`sagl sample`: sample images from a diffusion model, with or without guidance."""

import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING

from sagl.configuration.sample import parse_sample_config, sample_parser
from sagl.sampling.run import EXPORTS, SampleConfig, SamplingRun, lock_run
from sagl.sampling.run_folder import SHARDS, count_images, remove_superseded
from sagl.utils.distributed import (
    global_rank,
    has_launched_peers,
    launch,
    num_processes,
    refuse_on_all_ranks,
    select_device,
)
from sagl.utils.environment import peak_gigabytes, refuse_out_of_memory, set_threads
from sagl.utils.files import remove_partial
from sagl.utils.progress import ProgressReporter

__all__ = ["main", "sample_parser"]

if TYPE_CHECKING:
    from sagl.sampling.pipeline import SamplingPipeline


def main(arguments: list[str]) -> None:
    """Run `sagl sample [--sag.scale S] [--compare] [--output DIR] [--trainer.devices N] …`.

    Raises:
        UserError: the request cannot be met; what has been written is intact.
    """
    config = parse_sample_config(arguments)
    if global_rank() > 0:
        if not config.dry_run:
            sample_missing(config)
        return
    command = shlex.join(["sagl", "sample", *arguments])
    if config.dry_run:
        with refuse_out_of_memory("batch_size"):
            print_cost(config, SamplingRun.open(config, command))
        return
    with ExitStack() as stack:
        with refuse_on_all_ranks(config.devices):
            stack.enter_context(lock_run(config.output))
            run = SamplingRun.open(config, command)
            remove_partial(run.folder, "*", f"{SHARDS}/*")
            remove_superseded(run.folder)
            batches, pipeline = run.missing_batches(), None
            if batches:
                run.prepare_folder(batches)
        if batches or has_launched_peers():
            pipeline = sample_missing(config, run, batches)
        if not batches and not run.missing_exports():
            print(f"{run.folder} already contains this run.")
            return
        run.export(pipeline)
        print_summary(run)


def sample_missing(
    config: SampleConfig, run: SamplingRun | None = None, batches: Sequence[Sequence[int]] = ()
) -> "SamplingPipeline":
    """Sample the missing batches in all processes of this command, and return the pipeline.

    Rank 0 sends `run` and `batches` to the others. Each writes the shards of its share, whose bytes do not depend on
    the rank.
    """
    with launch(config.devices) as ranks:
        run, batches = ranks.broadcast((run, batches))
        assert run is not None
        pipeline = run.build_pipeline(ranks.device)
        if ranks.rank == 0 and batches:
            print_choices(config, run)
        title, kind = "guided" if pipeline.guidances else "sampling", config.progress if ranks.rank == 0 else "off"
        with ProgressReporter(title, sum(map(len, batches)), kind) as progress:

            def update_progress() -> None:
                progress.update(run.count_sampled(batches))

            for ids in ranks.share(batches):
                batch, seconds = run.write_batch(pipeline, ids, progress)
                if ranks.rank == 0:
                    run.record_batch(pipeline, batch, seconds * ranks.world_size)
                    update_progress()
            ranks.wait(update_progress)
            update_progress()  # another rank may have written the last shard after the last poll
    return pipeline


def print_choices(config: SampleConfig, run: SamplingRun) -> None:
    """Print the settings that were chosen for this machine and for the size of the images."""
    for guidance in config.guidances.values():
        for note in guidance.notes(run.network) if guidance.scale else ():
            print(note)
    num_batches, num_ranks = len(run.config.batches), num_processes(config.devices)[1]
    if num_batches < num_ranks:
        print(f"{num_ranks} processes share {_batches(num_batches)}, so some have no work. Lower --batch_size.")
    size, count = run.config.samples.effective_batch_size, run.config.samples.num_samples
    if (num_computed := num_batches * size) > 1.1 * count:
        print(f"Batches start at multiples of --batch_size {size}, so {num_computed} images are computed for {count}.")
    print_machine_choices(config, run)


def print_machine_choices(config: SampleConfig, run: SamplingRun) -> None:
    """Print precision and batch size, as far as the configuration leaves them open, with what they depend on."""
    choices = []
    if config.devices.precision == "auto":
        choices.append(f"--trainer.precision {run.config.devices.precision}")
    if config.samples.batch_size is None:
        choices.append(f"--batch_size {run.config.samples.batch_size}")
    if choices:
        accelerator = "cpu" if select_device(config.devices).type == "cpu" else "gpu"
        choices.insert(0, f"--trainer.accelerator {accelerator}")
        print("Chosen for this machine:", *choices, f"OMP_NUM_THREADS={set_threads(num_processes(config.devices)[0])}")


def print_summary(run: SamplingRun) -> None:
    """Print the content of the run folder, its cost and the next commands."""
    count, cost = count_images(run.folder), run.metadata
    rest = " without that of unguided images" if run.config.compare else ""
    print(f"{count} images in {run.folder}. Computing time of all processes{rest}: {cost['seconds']:.1f} s.")
    print(
        f"Cost of an image: {cost['nfe']:g} network evaluations, {cost['flops'] / 1e9:,.4g} GFLOPs, "
        f"{cost['seconds'] / count:.3g} s."
    )
    if (share := cost["mask_share"]) is not None:
        changes_nothing = share == 0 and run.config.guidances["sag"].direction_head is None
        effect = " SAG changed nothing: lower --sag.threshold." if changes_nothing else ""
        print(f"Masked in guided steps: {share:.1%} of the pixels.{effect}")
    exports = ", ".join(file for name in run.metadata["exports"] for file in EXPORTS[name]) or "shards only"
    print(f"Exports: {exports}. Next: sagl evaluate {run.folder}, or sagl export {run.folder} --help.")


def print_cost(config: SampleConfig, run: SamplingRun) -> None:
    """Time one network evaluation of a batch, and print the expected cost of the run."""
    import torch

    from sagl.sampling.pipeline import make_labels

    pipeline = run.build_pipeline(select_device(config.devices))
    print_choices(config, run)
    settings = run.config.samples
    ids = list(range(settings.effective_batch_size))
    with torch.inference_mode():
        labels = make_labels(settings, ids, pipeline.network)
        steps = pipeline.unguided.sample_progressive(settings.seed, ids, labels)
        seconds = 0.0
        for _ in range(2):  # the first step is slower
            start = time.monotonic()
            for _, x, prediction in islice(steps, 1):
                x.sum().item()  # waits for a GPU
                seconds = (time.monotonic() - start) / prediction.nfe
    evaluations = pipeline.nfe + pipeline.unguided.nfe * config.compare
    num_batches, num_ranks = len(run.missing_batches()), num_processes(config.devices)[1]
    duration = seconds * evaluations * -(-num_batches // num_ranks)
    shared = f" in {num_ranks} processes" if num_ranks > 1 else ""
    print(
        f"{settings.num_samples} images, {pipeline.nfe:g} network evaluations each, {_batches(num_batches)} of "
        f"{len(ids)} to do{shared}: about {duration:.1f} s ({seconds:.3f} s per evaluation of {len(ids)} images), "
        f"{peak_gigabytes():.1f} GB of memory. Nothing was written."
    )


def _batches(count: int) -> str:
    return "1 batch" if count == 1 else f"{count} batches"
