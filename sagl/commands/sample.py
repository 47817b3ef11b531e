"""`sagl sample`: images from a network, guided or not, and beside each other."""

import os
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sagl.commands.drawing import Drawing, Plan, recipe_of
from sagl.commands.job import Job, job_of
from sagl.commands.request import Request, parse, sample_parser  # noqa: F401 (of completion)
from sagl.sampling.run_folder import (
    count_images,
    missing_batches,
    read_run_json,
    remove_damaged,
    remove_partial,
    write_run_json,
)
from sagl.settings.guidance import DEFAULT_KERNEL_SIZE, SelfAttentionGuidance, effective_kernel_size
from sagl.utils.distributed import exit_when_parent_dies, global_rank, has_peers, num_processes
from sagl.utils.environment import disable_malloc_trim, peak_gigabytes, set_threads
from sagl.utils.files import require_writable
from sagl.utils.progress import show_progress
from sagl.utils.run_lock import RunLock, locked

if TYPE_CHECKING:  # torch is imported once the command line has been accepted
    from sagl.sampling.pipeline import SamplingPipeline

LIBRARIES = ("sagl", "torch", "torchvision", "numpy")
STRIP_SAMPLES = 4
"""The denoising strip shows so many, the first of the run."""


def main(arguments: list[str]) -> None:
    """Sample: `sagl sample [--sag.scale S] [--compare] [--output DIR] [--trainer.devices N] …`.

    Raises:
        UserError: the request cannot be met; nothing has been written.
    """
    request = parse(arguments)
    disable_malloc_trim()
    if global_rank() > 0:  # the first process decides, and refuses, for all
        from sagl.commands.spread import follow

        exit_when_parent_dies()
        follow(request)
        return
    job = job_of(request)
    if request.dry_run:
        _print_cost(request, job)
        return
    with _held(job) as lock:
        _make(request, job, arguments, lock)


@contextmanager
def _held(job: Job) -> Iterator[RunLock | None]:
    """The run's folder for this command alone; one that cannot be written may still hold all that is asked for."""
    if job.record and not os.access(job.folder, os.W_OK):
        yield None
    else:
        with locked(job.folder) as lock:
            yield lock


def _make(asked: Request, job: Job, arguments: list[str], lock: RunLock | None) -> None:
    """What is missing of the images, then of the views."""
    missing = missing_batches(job.folder, job.batches)
    record, recipe = _record(job, arguments), None
    if missing or has_peers():
        recipe = _draw(asked, job, missing, record, lock)
        record = read_run_json(job.folder)
    views = _views_to_make(job, record)
    if not missing and not views:
        print(f"{job.folder} already holds this run.")
        return
    if "strip" in views and recipe is None:
        recipe = recipe_of(job)
    _make_views(job, recipe, views, record)
    _report(job, record)


# ------------------------------------------------------------------------------------------------------- images


def _say_choices(asked: Request, job: Job, side: int) -> None:
    """What was left to this machine and to the size of the images, once, before the work."""
    sag = asked.guidances["sag"]
    assert isinstance(sag, SelfAttentionGuidance)
    if sag.scale and sag.kernel_size is None and (fits := effective_kernel_size(None, side)) < DEFAULT_KERNEL_SIZE:
        print(f"Blur kernel {fits}: the largest that fits {side}x{side} images.")
    chosen = {
        "trainer.precision": asked.device.precision == "auto" and job.request.device.precision,
        "batch_size": asked.run.batch_size is None and job.run.effective_batch_size,
    }
    threads = set_threads(num_processes(asked.device)[0])
    if shown := [f"--{name} {value}" for name, value in chosen.items() if value]:
        print(" ".join(["Chosen for this machine:", *shown, f"OMP_NUM_THREADS={threads}"]))


def _draw(
    asked: Request, job: Job, missing: Sequence[Sequence[int]], record: dict[str, Any], lock: RunLock | None
) -> "SamplingPipeline":
    """Make the missing micro-batches, in this process or in several."""
    require_writable(job.folder)
    assert lock is not None
    recipe = recipe_of(job)
    _say_choices(asked, job, recipe.network.settings.image_size)
    remove_partial(job.folder)
    remove_damaged(job.folder, missing)
    here, processes = num_processes(job.request.device)
    plan = Plan(job=job, missing=missing, record=record | {"nfe": recipe.nfe, "views": {}})
    with show_progress(
        job.request.progress, "guided" if recipe.guidances else "sampling", sum(map(len, missing))
    ) as watch:
        drawing = Drawing(plan=plan, recipe=recipe, watch=watch, processes=processes)
        if processes > 1:
            from sagl.commands.spread import spread

            spread(drawing, here, lock)
        else:
            for wanted in missing:
                drawing.lead(wanted)
                watch.images(len(wanted))
    return recipe


# ---------------------------------------------------------------------------------------------- views and record


def _record(job: Job, arguments: list[str]) -> dict[str, Any]:
    """run.json before the run goes on."""
    return {
        "settings": job.settings,
        "num_samples": max(job.run.num_samples, job.record.get("num_samples", 0)),
        "batch_size": job.run.effective_batch_size,
        "model": job.request.source.name,
        "checkpoint": str(job.weights.resolve()),
        "nfe": job.record.get("nfe", 0),
        "seconds": job.record.get("seconds", 0.0),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "command": shlex.join(["sagl", "sample", *arguments]),
        "views": job.record.get("views", {}),
    }


def _views_to_make(job: Job, record: dict[str, Any]) -> tuple[str, ...]:
    """The views asked for that were not made of all images that the folder holds."""
    count = count_images(job.folder)
    return tuple(view for view in job.request.views_of(count) if record["views"].get(view) != count)


def _make_views(job: Job, recipe: "SamplingPipeline | None", views: Sequence[str], record: dict[str, Any]) -> None:
    """Make the views from the shards, and note in run.json that they are there."""
    from sagl.sampling.exports import npz_name, write_grid, write_images, write_npz

    count = count_images(job.folder)
    for view in views:
        if view == "grid":
            write_grid(job.folder, job.folder / "grid.png")
        elif view == "images":
            write_images(job.folder, job.folder / "images")
        elif view == "npz":
            for older in job.folder.glob("samples_*.npz"):
                older.unlink()
            write_npz(job.folder, job.folder / npz_name(job.folder, count), count)
        elif recipe is not None:
            _write_strip(job, recipe)
        record["views"][view] = count
        write_run_json(job.folder, record)


def _write_strip(job: Job, recipe: "SamplingPipeline") -> None:
    import torch

    from sagl.sampling.pipeline import make_labels, x0_predictions
    from sagl.sampling.strip import Frame, kept_steps, write_strip
    from sagl.utils.images import to_uint8

    ids = list(range(job.run.first_id, job.run.first_id + min(STRIP_SAMPLES, job.run.num_samples)))
    kept = kept_steps(recipe.schedule.num_steps)
    with torch.inference_mode():
        chain = x0_predictions(recipe, job.run.seed, ids, make_labels(job.run, ids, recipe.network))
        frames = [
            Frame(step=s, x0_hat=to_uint8(x).cpu(), mask=None if m is None else m.cpu())
            for s, x, m in chain
            if s in kept
        ]
    write_strip(frames, job.folder)


def _report(job: Job, record: dict[str, Any]) -> None:
    cost = f"{record['seconds']:.1f} s, {record['nfe']} network evaluations each"
    print(f"{count_images(job.folder)} images in {job.folder}, {cost}.")
    made = record["views"]
    files = {"grid": "grid.png", "images": "images/", "npz": "samples_*.npz", "strip": "strip.png, strip.gif"}
    shown = ", ".join(files[view] for view in made) or "shards/ only"
    print(f"Made: {shown}. Next: sagl evaluate {job.folder}, or sagl export {job.folder} --help.")


def _print_cost(asked: Request, job: Job) -> None:
    """Time one micro-batch's step, and say what the run would cost."""
    import torch

    from sagl.sampling.pipeline import make_labels

    recipe = recipe_of(job)
    _say_choices(asked, job, recipe.network.settings.image_size)
    ids = list(range(job.run.effective_batch_size))
    steps_done: list[float] = [time.monotonic()]
    with torch.inference_mode():
        for _ in recipe.unguided.sample_progressive(job.run.seed, ids, make_labels(job.run, ids, recipe.network)):
            steps_done.append(time.monotonic())
            if len(steps_done) == 3:
                break
    seconds = steps_done[-1] - steps_done[-2]
    evaluations = recipe.nfe + recipe.schedule.num_steps * job.request.compare
    batches = len(missing_batches(job.folder, job.batches))
    print(
        f"{job.run.num_samples} images, {recipe.nfe} network evaluations each, {batches} micro-batches of {len(ids)} "
        f"to do: about {seconds * evaluations * batches:.1f} s ({seconds:.3f} s an evaluation of {len(ids)} images), "
        f"{peak_gigabytes():.1f} GB of memory. Nothing was written."
    )
