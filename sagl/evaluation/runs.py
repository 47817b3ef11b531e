"""Reading of sampling runs for a comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagl.errors import UserError, require
from sagl.evaluation.report import ImageGrid, printable
from sagl.evaluation.results import EvaluationResult, read_results
from sagl.guidance.registry import GUIDANCES
from sagl.sampling.run_folder import (
    SAMPLES,
    count_images,
    decode_png,
    get_samples,
    is_run,
    iter_samples,
    read_run_json,
    shared_ids,
)
from sagl.utils.config_files import flatten

NUM_SAMPLES = 8
"""Default number of images of each run."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Data of a run that a comparison shows."""

    name: str
    """Shortest name that no other run of the comparison has."""
    folder: str
    """Path as given."""
    model: str | None
    """Name of the network; None for the user's own."""
    settings: Mapping[str, Any]
    """Settings that determine an image, by full name (`sag.scale`)."""
    num_images: int
    num_requested: int
    size: tuple[int, int] | None
    """(W, H) in pixels; None if there are no images."""
    nfe: float | None
    """Network evaluations per image."""
    flops: float | None
    """Floating-point operations of these evaluations."""
    seconds: float | None
    """Duration of rank 0's batches, times the number of processes."""
    results: tuple[EvaluationResult, ...]

    def is_active(self, setting: str) -> bool:
        """Return whether a setting has an effect: all but those of a guidance method with scale 0."""
        group, _, name = setting.rpartition(".")
        return name == "scale" or self.settings.get(f"{group}.scale") != 0

    @property
    def guidance(self) -> str:
        """The scales of the active guidance methods."""
        scales = {f"{name}.scale": self.settings.get(f"{name}.scale") for name in GUIDANCES}
        return ", ".join(f"{name} {printable(scale)}" for name, scale in scales.items() if scale) or "no guidance"


def read_runs(names: Sequence[str]) -> list[RunSummary]:
    """Read the runs in these folders.

    Raises:
        UserError: a folder is no run or is named twice, or a file is damaged.
    """
    folders: dict[Path, Path] = {}
    for folder in map(Path, names):
        require(is_run(folder), f"`run` must be a folder written by sagl sample, and {folder} is none.")
        same = folders.setdefault(folder.resolve(), folder)
        require(same is folder, f"`run` must be different folders, and {folder} is the same as {same}. Remove one.")
    short_names = [folder.name for folder in folders]
    return [
        _read_run(folder, printable(name if short_names.count(name) == 1 else folder))
        for name, folder in zip(short_names, folders.values(), strict=True)
    ]


def _read_run(folder: Path, name: str) -> RunSummary:
    try:
        metadata = read_run_json(folder, "run")
    except OSError as error:
        raise UserError(f"`run` {folder} cannot be read: {error.strerror}.") from error
    model, checkpoint, num_images = metadata.get("model"), metadata.get("checkpoint"), count_images(folder)
    network = model or (Path(checkpoint).name if isinstance(checkpoint, str) else None)
    first = next(iter_samples(folder, 1), None)
    height, width = (0, 0) if first is None else decode_png(first.pngs[SAMPLES]).shape[:2]
    settings = {"model": network, **flatten(metadata["settings"]), "batch_size": metadata.get("batch_size")}
    unknown = (f"{name}.scale" for name in GUIDANCES if f"{name}.scale" not in settings)  # a run of an older version
    settings |= dict.fromkeys(unknown, 0.0)
    return RunSummary(
        name=name,
        folder=str(folder),
        model=model if isinstance(model, str) else None,
        settings=settings | flatten({"versions": metadata.get("versions", {})}),
        num_images=num_images,
        num_requested=max(num_images, metadata.get("num_samples", 0)),
        size=(width, height) if first else None,
        nfe=metadata.get("nfe"),
        flops=metadata.get("flops"),
        seconds=metadata.get("seconds"),
        results=read_results(folder),
    )


def read_images(runs: Sequence[RunSummary], num_samples: int | None = None) -> ImageGrid | None:
    """Read the images of the first ids that all runs hold; None if there are none to show.

    Args:
        runs: the runs.
        num_samples: number of images per run; None for up to 8.

    Raises:
        UserError: the runs share fewer ids than `num_samples`, or their images have different sizes.
    """
    folders = [Path(run.folder) for run in runs]
    ids, sizes = shared_ids(folders, NUM_SAMPLES if num_samples is None else num_samples), image_sizes(runs)
    if num_samples is not None:
        require(
            len(ids) == num_samples,
            f"`num_samples` must be at most {len(ids)}, the number of ids that all runs hold, got {num_samples}.",
        )
        require(
            num_samples == 0 or len(sizes) == 1,
            f"`num_samples` must be 0 for images of different sizes, {', '.join(sizes)}, got {num_samples}.",
        )
    if not ids or len(sizes) != 1 or runs[0].size is None:
        return None
    rows = {
        run.name: tuple(sample.pngs[SAMPLES] for sample in get_samples(folder, ids))
        for run, folder in zip(runs, folders, strict=True)
    }
    return ImageGrid(ids=tuple(ids), rows=rows, image_size=runs[0].size[0])


def have_shared_ids(runs: Sequence[RunSummary]) -> bool:
    """Return whether there is an id that all runs hold."""
    return bool(shared_ids([Path(run.folder) for run in runs], 1))


def image_sizes(runs: Sequence[RunSummary]) -> list[str]:
    """Return the different sizes of the runs' images."""
    return [f"{width}×{height}" for width, height in sorted({run.size for run in runs if run.size})]
