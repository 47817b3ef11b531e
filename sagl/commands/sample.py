"""`sagl sample`: images from a network, guided or not, and beside each other."""

import platform
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from sagl.models.zoo import EMBEDDED, described
from sagl.settings.errors import UserError, require
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import ChainSettings, RunSettings

if TYPE_CHECKING:  # torch is imported once the command line has been accepted
    from torch import Tensor

    from sagl.recipe import Recipe
    from sagl.shapes import ImageUint8

GRID_SAMPLES = 256
"""The grid shows so many, the first; the other files hold all."""
LIBRARIES = ("sagl", "torch", "torchvision", "numpy")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A command line, checked."""

    checkpoint: Path
    weights: Literal["ema", "raw"]
    output: Path
    compare: bool
    run: RunSettings
    chain: ChainSettings
    sag: SelfAttentionGuidance

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what is in the run folder."""
        name = "embedded" if self.checkpoint == EMBEDDED else str(self.checkpoint)
        apart = {"checkpoint": name, "weights": self.weights, "compare": self.compare}
        return {**apart, **asdict(self.run), **asdict(self.chain), "sag": asdict(self.sag)}


def parser() -> ArgumentParser:
    """The flags; their help is the fields' docstrings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    p = ArgumentParser(
        prog="sagl sample",
        description="Draw images from a network, with self-attention guidance.",
        exit_on_error=False,
    )
    p.add_argument("--checkpoint", default=str(EMBEDDED), help=".safetensors or .ckpt; default: the embedded network.")
    p.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="Which of a training checkpoint's.")
    p.add_argument("--output", default="samples", help="Folder for grid, images, npz and run.json.")
    p.add_argument("--compare", action="store_true", help="Add the unguided images at the same seeds, and the masks.")
    p.add_class_arguments(RunSettings, as_group=True)
    p.add_class_arguments(ChainSettings, as_group=True)
    p.add_class_arguments(SelfAttentionGuidance, "sag")
    return p


def parse(arguments: list[str]) -> Request:
    """Flags, over what the weights recommend, over the fields' defaults.

    Raises:
        UserError, ArgumentError: a flag is unknown or out of range.
    """
    p = parser()
    checkpoint = Path(p.parse_args(arguments).checkpoint)
    advise(p, described(checkpoint).get("recommended", {}))
    given = p.parse_args(arguments)
    return Request(
        checkpoint=checkpoint,
        weights=given.weights,
        output=Path(given.output),
        compare=given.compare,
        run=_fields(RunSettings, given),
        chain=_fields(ChainSettings, given),
        sag=_fields(SelfAttentionGuidance, given.sag),
    )


def advise(p: ArgumentParser, recommended: dict[str, Any]) -> None:
    """Make recommended settings the parser's defaults.

    Raises:
        UserError: they are not settings of `sagl sample`.
    """
    try:
        given = p.parse_object(recommended)
        _fields(RunSettings, given), _fields(ChainSettings, given), _fields(SelfAttentionGuidance, given.sag)
    except (KeyError, TypeError, ValueError, AttributeError, ArgumentError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"`recommended` must be settings of sagl sample, got {recommended}: {reason}") from error
    p.set_defaults(recommended)


def main(arguments: list[str]) -> None:
    """Sample: `sagl sample [--sag.scale S] [--compare] [--output DIR] …`.

    Raises:
        UserError: the request cannot be met; nothing has been written.
    """
    request = parse(arguments)
    require(not request.compare or request.sag.scale != 0, "`compare` needs guidance, got scale 0. Give --sag.scale.")
    require(
        request.output.is_dir() or not request.output.exists(),
        f"`output` must be a folder, and {request.output} is a file. Choose another name.",
    )
    require(request.checkpoint.is_file(), f"`checkpoint` must be a file, and there is none at {request.checkpoint}.")
    from sagl.data.run_folder import is_complete
    from sagl.models.checkpoints import build_network, read_network, sha256
    from sagl.recipe import labels_of, micro_batches, prepare

    settings = {**request.settings, "weights_sha256": sha256(request.checkpoint)}
    if is_complete(request.output, settings):
        print(f"{request.output} already holds this run.")
        return
    file = read_network(request.checkpoint, request.weights)
    recipe = prepare(build_network(file), file.diffusion, request.chain, request.sag)
    labels_of(request.run, next(micro_batches(request.run)), recipe.network)  # refused before anything is written
    _report_kernel(request, recipe)
    started = time.monotonic()
    rows, labels = _rows(request, recipe)
    _write(
        request, settings, recipe, rows, labels, time.monotonic() - started, shlex.join(["sagl", "sample", *arguments])
    )


def _fields(kind: Any, given: Namespace) -> Any:  # noqa: ANN401 (a settings class -> its instance)
    return kind(**{name: given[name] for name in kind.__dataclass_fields__})


def _report_kernel(request: Request, recipe: "Recipe") -> None:
    from sagl.guidance.blur import fitting_kernel
    from sagl.settings.guidance import DEFAULT_KERNEL

    side = recipe.network.settings.image_size
    if request.sag.scale and request.sag.kernel_size is None and (fits := fitting_kernel(None, side)) < DEFAULT_KERNEL:
        print(f"Blur kernel {fits}: the largest that fits {side}x{side} images.")


def _rows(request: Request, recipe: "Recipe") -> tuple[dict[str, "ImageUint8"], list[int]]:
    """Images by the name of their row, and the label of each sample (-1: none)."""
    from sagl.data.grid import mask_pictures

    rows = {}
    if request.compare:
        rows["unguided"] = _draw(request.run, recipe.unguided, "unguided")[0]
    images, share, labels = _draw(request.run, recipe, "guided" if recipe.guidances else "sampling")
    rows["samples"] = images
    if request.compare and share is not None:
        rows["masks"] = mask_pictures(share)
    return rows, labels


def _draw(run: RunSettings, recipe: "Recipe", title: str) -> tuple["ImageUint8", "Tensor | None", list[int]]:
    """All images of a run, (N, C, H, W); the masked share of guided steps, if any; labels."""
    import torch

    from sagl.data.pixels import to_uint8
    from sagl.recipe import collect, labels_of, micro_batches

    batches = list(micro_batches(run))
    first = run.first_id - batches[0][0]
    kept = slice(first, first + run.num_samples)
    images, shares = [], []
    labels: list[int] = []
    with torch.inference_mode():
        for number, ids in enumerate(batches, start=1):
            drawn = labels_of(run, ids, recipe.network)
            chain = recipe.chain(run.seed, ids, drawn)
            x, share = collect(_shown(chain, f"{title} {number}/{len(batches)}", recipe.schedule.num_steps))
            images.append(to_uint8(x))
            shares += [] if share is None else [share]
            labels += [-1] * len(ids) if drawn is None else drawn.tolist()
    return torch.cat(images)[kept], torch.cat(shares)[kept] if shares else None, labels[kept]


def _shown(chain: Iterator[Any], title: str, num_steps: int) -> Iterator[Any]:
    """The chain, with a bar on a terminal and one line elsewhere."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(chain, title, total=num_steps, console=console, transient=True)
    else:
        yield from chain
        console.print(f"{title}: {num_steps} steps done", highlight=False)


def _write(
    request: Request,
    settings: dict[str, Any],
    recipe: "Recipe",
    rows: dict[str, "ImageUint8"],
    labels: list[int],
    seconds: float,
    command: str,
) -> None:
    from sagl.data.grid import save_png, stacked_grid
    from sagl.data.run_folder import write_run

    record = {
        "settings": settings,
        "nfe": recipe.nfe,
        "seconds": round(seconds, 2),
        "rows": list(rows),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "command": command,
    }
    request.output.mkdir(parents=True, exist_ok=True)
    save_png(stacked_grid([row[:GRID_SAMPLES] for row in rows.values()]), request.output / "grid.png")
    npz = write_run(request.output, rows["samples"], labels, record, request.run.first_id)
    print(f"{len(labels)} images in {seconds:.1f} s, {recipe.nfe} network evaluations each.")
    print(f"Look at {request.output / 'grid.png'} ({', above '.join(rows)}); arrays in {npz}.")
