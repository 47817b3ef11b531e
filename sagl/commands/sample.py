"""`sagl sample`: images from a network, guided or not, and beside each other."""

import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagl.commands.progress import Watch, watching
from sagl.commands.request import Request, Source, parse
from sagl.data.run_folder import (
    SAMPLES,
    Sample,
    holds_run,
    missing_batches,
    num_held,
    png,
    read_record,
    remove_damaged,
    remove_replaced,
    require_same_run,
    write_record,
    write_shard,
)
from sagl.machine import available_bytes, fast_precision, keep_freed_memory, peak_gigabytes, set_threads
from sagl.models.zoo import described, settings_of
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.errors import UserError, require
from sagl.settings.fitting import require_fitting, require_guiding, require_labels
from sagl.settings.guidance import DEFAULT_KERNEL, fitting_kernel
from sagl.settings.network import UNetSettings
from sagl.settings.paths import cache_folder, require_writable, sha256
from sagl.settings.sampling import RunSettings, micro_batches

if TYPE_CHECKING:  # torch is imported once the command line has been accepted
    import torch

    from sagl.models.adm import Classifier
    from sagl.models.checkpoints import NetworkFile
    from sagl.recipe import Recipe
    from sagl.shapes import Image, ImageUint8

LIBRARIES = ("sagl", "torch", "torchvision", "numpy")
STRIP_SAMPLES = 4
"""The denoising strip shows so many, the first of the run."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request whose weights are at hand, and the folder that is to hold it."""

    request: Request
    weights: Path
    run: RunSettings
    settings: dict[str, Any]
    """All that decides an image; what a folder must have been made with to be continued."""
    record: dict[str, Any]
    """run.json as it is in the folder; empty for a new one."""

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.request.output

    @property
    def batches(self) -> list[range]:
        """Ids that are wanted of each micro-batch."""
        first, end = self.run.first_id, self.run.first_id + self.run.num_samples
        return [range(max(first, ids[0]), min(end, ids[-1] + 1)) for ids in micro_batches(self.run)]


def main(arguments: list[str]) -> None:
    """Sample: `sagl sample [--sag.scale S] [--compare] [--output DIR] …`.

    Raises:
        UserError: the request cannot be met; nothing has been written.
    """
    request = parse(arguments)
    keep_freed_memory()
    _refuse_contradictions(request)
    job = _job(request)
    if request.dry_run:
        _print_cost(request, job)
        return
    missing = missing_batches(job.folder, job.batches)
    record, recipe = _record(job, arguments), None
    if missing:
        require_writable(job.folder)
        recipe = _recipe(job)
        _say_choices(request, job)
        _draw(job, recipe, missing, record | {"nfe": recipe.nfe, "views": {}})
        record = read_record(job.folder)
    views = _views_to_make(job, record)
    if not missing and not views:
        print(f"{job.folder} already holds this run.")
        return
    if "strip" in views and recipe is None:
        recipe = _recipe(job)
    _make_views(job, recipe, views, record)
    _report(job, record)


# -------------------------------------------------------------------------------------------- what is asked for


def _refuse_contradictions(request: Request) -> None:
    """What can be seen to be impossible before any torch is loaded."""
    guided = request.sag.scale or request.cfg.scale or request.classifier.scale
    require(not request.compare or bool(guided), "`compare` needs guidance, got scale 0. Give --sag.scale.")
    c = request.classifier
    require(
        not c.scale or c.checkpoint is not None, "`classifier.scale` needs a classifier. Add --classifier.checkpoint."
    )
    require(
        not c.scale or request.run.labels != "null", "`classifier.scale` needs labels, got null. Give --labels random."
    )
    require(
        not request.cfg.scale or request.run.labels != "null",
        "`cfg.scale` needs labels, got null. Give --labels random.",
    )
    if not holds_run(request.output):  # a whole run can be asked for where nothing can be written
        require_writable(request.output)


def _job(request: Request) -> Job:
    """Find the weights, check what is asked against them and against what the folder holds.

    Raises:
        UserError: one does not go with the other.
    """
    network, diffusion = _known(request.source)
    require_fitting(network, diffusion, request.sag, request.cfg)
    require_labels(request.run, network)
    from sagl.diffusion.respacing import respaced_timesteps

    respaced_timesteps(request.chain.respacing, diffusion.num_timesteps)
    weights = request.source.checkpoint or _fetched(request.source)
    request = _with_precision(request, read_record(request.output))
    settings = {**request.settings, "weights_sha256": _sha256(weights)}
    if request.source.network is not None:  # the file does not say, so the settings came from elsewhere
        settings |= {"network": asdict(network), "diffusion": asdict(diffusion)}
    record = require_same_run(request.output, settings)
    return Job(
        request=request,
        weights=weights,
        run=_sized(request, network, record),
        settings=settings,
        record=record,
    )


def _known(source: Source) -> tuple[Any, Any]:
    """Settings of network and process; a training checkpoint is opened for them, other files are not."""
    if source.network is not None:
        return source.network, source.diffusion or DiffusionSettings()
    assert source.checkpoint is not None
    if about := described(source.checkpoint):
        return settings_of(about, source.checkpoint)
    file = _read(source, source.checkpoint)
    return file.network, file.diffusion


def _with_precision(request: Request, record: Mapping[str, Any]) -> Request:
    """The request with its precision: as given, as the folder has it, or as suits the device."""
    if request.device.precision != "auto":
        return request
    found = record.get("settings", {}).get("precision")
    return replace(request, device=replace(request.device, precision=found or fast_precision(_device(request))))


def _sized(request: Request, network: UNetSettings, record: dict[str, Any]) -> RunSettings:
    """The run with its batch size: as given, as the folder has it, or as suits the images' size and the memory."""
    run, found = request.run, record.get("batch_size")
    require(
        run.batch_size in (None, found) or found is None,
        f"`output` holds a run with batch_size {found}, got {run.batch_size}. Leave it out, or choose another folder.",
    )
    return replace(run, batch_size=run.batch_size or found or _suiting(request, network))


def _suiting(request: Request, network: UNetSettings) -> int:
    """Up to 64 images at once: on a CPU as many as its caches like, and no more than fit three quarters of memory."""
    from sagl.models.checkpoints import DTYPES
    from sagl.models.footprint import forward_bytes

    device = _device(request)
    most = 64 if device.type != "cpu" else max(1, min(64, (512 // network.image_size) ** 2))
    available = available_bytes(device)
    if available is not None:
        weights, each = forward_bytes(network, DTYPES[request.weight_precision])
        most = min(most, max(1, (available * 3 // 4 - weights) // each))
    return min(request.run.num_samples, most)


def _fetched(source: Source) -> Path:
    from sagl.models.loading import fetch

    assert source.name is not None
    return fetch(source.name)


def _sha256(path: Path) -> str:
    from sagl.models.fingerprint import recorded_sha256

    if path.is_relative_to(cache_folder()):  # large, and read again and again
        return recorded_sha256(path)
    return sha256(path)


def _read(source: Source, path: Path) -> "NetworkFile":
    from sagl.models.checkpoints import read_network

    return read_network(path, source.weights, source.network, source.diffusion)


def _recipe(job: Job) -> "Recipe":
    from sagl.models.checkpoints import as_weights, build_network
    from sagl.recipe import prepare

    request = job.request
    file, device = _read(request.source, job.weights), _device(request)
    network = as_weights(build_network(file), request.weight_precision, device)
    if request.device.compile:
        network.compile(dynamic=False)  # every micro-batch has the same size
    classifier = _classifier(request, file, device) if request.classifier.scale else None
    _say_kernel(request, network.settings.image_size)
    return prepare(network, file.diffusion, request.chain, request.sag, classifier, request.classifier, request.cfg)


def _classifier(request: Request, guided: "NetworkFile", device: "torch.device") -> "Classifier":
    from sagl.models.checkpoints import as_weights, build_classifier
    from sagl.models.loading import load

    assert request.classifier.checkpoint is not None
    try:
        file = load(request.classifier.checkpoint)
        classifier = build_classifier(file)
    except UserError as error:
        said = str(error).replace("`model`", "`checkpoint`").replace("`checkpoint`", "`classifier.checkpoint`")
        raise UserError(said) from error
    assert isinstance(guided.network, UNetSettings)
    require_guiding(classifier.settings, file.diffusion, guided.network, guided.diffusion)
    return as_weights(classifier, request.weight_precision, device)


def _device(request: Request) -> "torch.device":
    import torch

    there = torch.cuda.is_available()
    require(request.device.accelerator != "gpu" or there, "`trainer.accelerator` gpu needs a GPU, and torch sees none.")
    return torch.device("cuda" if there and request.device.accelerator != "cpu" else "cpu")


def _say_kernel(request: Request, side: int) -> None:
    if request.sag.scale and request.sag.kernel_size is None and (fits := fitting_kernel(None, side)) < DEFAULT_KERNEL:
        print(f"Blur kernel {fits}: the largest that fits {side}x{side} images.")


def _say_choices(asked: Request, job: Job) -> None:
    """What was left to this machine, and how to have it otherwise; once, before the work."""
    chosen = {
        "trainer.precision": asked.device.precision == "auto" and job.request.device.precision,
        "batch_size": asked.run.batch_size is None and job.run.images_at_once,
    }
    threads = set_threads()
    if shown := [f"--{name} {value}" for name, value in chosen.items() if value]:
        print(" ".join(["Chosen for this machine:", *shown, f"OMP_NUM_THREADS={threads}"]))


# ------------------------------------------------------------------------------------------------------- images


def _draw(job: Job, recipe: "Recipe", missing: Sequence[Sequence[int]], record: dict[str, Any]) -> None:
    """Make the missing micro-batches, each on the disk before the next begins."""
    remove_damaged(job.folder, missing)
    title = "guided" if recipe.guidances else "sampling"
    with watching(job.request.progress, title, sum(map(len, missing))) as watch:
        for wanted in missing:
            started = time.monotonic()
            samples = _micro_batch(job, recipe, wanted, watch)
            write_record(job.folder, record)  # not before there is something to record
            write_shard(job.folder, samples)
            remove_replaced(job.folder)
            record["seconds"] = round(record["seconds"] + time.monotonic() - started, 2)
            write_record(job.folder, record)
            watch.images(len(wanted))


def _micro_batch(job: Job, recipe: "Recipe", wanted: Sequence[int], watch: Watch) -> list[Sample]:
    """The samples wanted of one micro-batch, which is always computed at full size."""
    import torch

    from sagl.data.pixels import to_uint8
    from sagl.recipe import collect, labels_of

    size = job.run.images_at_once
    first = wanted[0] - wanted[0] % size
    ids = list(range(first, first + size))
    with torch.inference_mode():
        labels = labels_of(job.run, ids, recipe.network)
        rows: dict[str, ImageUint8] = {}
        if job.request.compare:
            chain = recipe.unguided.chain(job.run.seed, ids, labels)
            rows["unguided"] = to_uint8(_finite(collect(watch.steps(chain, recipe.schedule.num_steps))[0]))
        x, share = collect(watch.steps(recipe.chain(job.run.seed, ids, labels), recipe.schedule.num_steps))
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
    from sagl.data.pixels import to_rgb

    return [png(image) for image in to_rgb(row[start : start + count]).permute(0, 2, 3, 1).cpu().contiguous().numpy()]


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

    recipe = _recipe(job)
    _say_choices(asked, job)
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
