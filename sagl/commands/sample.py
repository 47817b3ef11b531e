"""`sagl sample`: images from a network, guided or not, and beside each other."""

import os
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sagl.commands.devices import others_wait, processes_of
from sagl.commands.drawing import Drawing, Plan, recipe_of
from sagl.commands.job import Job, job_of
from sagl.commands.progress import watching
from sagl.commands.request import Request, parse
from sagl.data.run_folder import (
    missing_batches,
    num_held,
    read_record,
    remove_damaged,
    remove_partial,
    write_record,
)
from sagl.data.run_lock import RunLock, locked
from sagl.machine import end_with_parent, global_rank, keep_freed_memory, peak_gigabytes, set_threads
from sagl.settings.guidance import DEFAULT_KERNEL, fitting_kernel
from sagl.settings.paths import require_writable

if TYPE_CHECKING:  # torch is imported once the command line has been accepted
    from sagl.recipe import Recipe

LIBRARIES = ("sagl", "torch", "torchvision", "numpy")
STRIP_SAMPLES = 4
"""The denoising strip shows so many, the first of the run."""


def main(arguments: list[str]) -> None:
    """Sample: `sagl sample [--sag.scale S] [--compare] [--output DIR] [--trainer.devices N] …`.

    Raises:
        UserError: the request cannot be met; nothing has been written.
    """
    request = parse(arguments)
    keep_freed_memory()
    if global_rank() > 0:  # the first process decides, and refuses, for all
        from sagl.commands.spread import follow

        end_with_parent()
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
    if missing or others_wait():
        recipe = _draw(asked, job, missing, record, lock)
        record = read_record(job.folder)
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
    if asked.sag.scale and asked.sag.kernel_size is None and (fits := fitting_kernel(None, side)) < DEFAULT_KERNEL:
        print(f"Blur kernel {fits}: the largest that fits {side}x{side} images.")
    chosen = {
        "trainer.precision": asked.device.precision == "auto" and job.request.device.precision,
        "batch_size": asked.run.batch_size is None and job.run.images_at_once,
    }
    threads = set_threads(processes_of(asked.device)[0])
    if shown := [f"--{name} {value}" for name, value in chosen.items() if value]:
        print(" ".join(["Chosen for this machine:", *shown, f"OMP_NUM_THREADS={threads}"]))


def _draw(
    asked: Request, job: Job, missing: Sequence[Sequence[int]], record: dict[str, Any], lock: RunLock | None
) -> "Recipe":
    """Make the missing micro-batches, in this process or in several."""
    require_writable(job.folder)
    assert lock is not None
    recipe = recipe_of(job)
    _say_choices(asked, job, recipe.network.settings.image_size)
    remove_partial(job.folder)
    remove_damaged(job.folder, missing)
    here, processes = processes_of(job.request.device)
    plan = Plan(job=job, missing=missing, record=record | {"nfe": recipe.nfe, "views": {}})
    with watching(job.request.progress, "guided" if recipe.guidances else "sampling", sum(map(len, missing))) as watch:
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
        "batch_size": job.run.images_at_once,
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
    count = num_held(job.folder)
    return tuple(view for view in job.request.views_of(count) if record["views"].get(view) != count)


def _make_views(job: Job, recipe: "Recipe | None", views: Sequence[str], record: dict[str, Any]) -> None:
    """Make the views from the shards, and note in run.json that they are there."""
    from sagl.data.views import npz_name, write_grid, write_images, write_npz

    count = num_held(job.folder)
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
        write_record(job.folder, record)


def _write_strip(job: Job, recipe: "Recipe") -> None:
    import torch

    from sagl.data.pixels import to_uint8
    from sagl.data.strip import Frame, kept_steps, write_strip
    from sagl.recipe import estimates, labels_of

    ids = list(range(job.run.first_id, job.run.first_id + min(STRIP_SAMPLES, job.run.num_samples)))
    kept = kept_steps(recipe.schedule.num_steps)
    with torch.inference_mode():
        chain = estimates(recipe, job.run.seed, ids, labels_of(job.run, ids, recipe.network))
        frames = [
            Frame(step=s, x0_hat=to_uint8(x).cpu(), mask=None if m is None else m.cpu())
            for s, x, m in chain
            if s in kept
        ]
    write_strip(frames, job.folder)


def _report(job: Job, record: dict[str, Any]) -> None:
    cost = f"{record['seconds']:.1f} s, {record['nfe']} network evaluations each"
    print(f"{num_held(job.folder)} images in {job.folder}, {cost}.")
    made = record["views"]
    files = {"grid": "grid.png", "images": "images/", "npz": "samples_*.npz", "strip": "strip.png, strip.gif"}
    shown = ", ".join(files[view] for view in made) or "shards/ only"
    print(f"Made: {shown}. Next: sagl evaluate {job.folder}, or sagl export {job.folder} --help.")


def _print_cost(asked: Request, job: Job) -> None:
    """Time one micro-batch's step, and say what the run would cost."""
    import torch

    from sagl.recipe import labels_of

    recipe = recipe_of(job)
    _say_choices(asked, job, recipe.network.settings.image_size)
    ids = list(range(job.run.images_at_once))
    steps_done: list[float] = [time.monotonic()]
    with torch.inference_mode():
        for _ in recipe.unguided.chain(job.run.seed, ids, labels_of(job.run, ids, recipe.network)):
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
