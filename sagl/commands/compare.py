"""`sagl compare`: runs side by side, on the terminal or as a page with their images at equal ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sagl.commands.parser import Parser
from sagl.errors import UserError, require
from sagl.evaluation.comparison import (
    Run,
    alike_line,
    cost_section,
    number_sections,
    paper_table,
    settings_section,
    split_settings,
)
from sagl.evaluation.html import html_page
from sagl.evaluation.report import MARK, Gallery, Sheet, Table, clean, enumerated
from sagl.evaluation.results import read_evaluations
from sagl.evaluation.text import markdown, show
from sagl.sampling.run_folder import (
    SAMPLES,
    count_images,
    flat,
    get_samples,
    is_run,
    iter_samples,
    pixels,
    read_run_json,
    shared_ids,
)
from sagl.utils.files import atomic_file

HTML, MARKDOWN = (".html", ".htm"), (".md",)
WITH_VALUES = ("--output", "--samples")
"""Flags behind which a value stands."""
NUM_SHOWN = 8
"""Images of a run on a page, unless another number is asked for."""
MOST = 1e15
"""Numbers of a record from here on, and nan, are none."""
HEAD = 200
"""Within so many bytes of its beginning a file of ours says so."""


def compare_parser() -> Parser:
    """The flags."""
    p = Parser("compare", "Runs side by side: settings that differ, cost, numbers, images at equal ids.")
    p.usage = "sagl compare RUN [RUN …] [options]"
    p.add_argument("run", type=str, nargs="+", help="Folders that sagl sample wrote.")
    p.add_argument("--output", type=str, default=None, help="A page with images: FILE.html, or FILE.md and FILE.png.")
    p.add_argument("--samples", type=int, default=None, help="Images of each run on the page, 0 for none; default: 8.")
    p.add_argument("--overwrite", action="store_true", help="Replace a file that sagl compare did not make.")
    return p


def main(arguments: list[str]) -> None:
    """Compare: `sagl compare RUN RUN … [--output FILE.html] [--samples N]`.

    Raises:
        UserError: a folder that is no run, or the same one twice; a damaged file; a page that would replace another
            file; images asked for that the runs do not share. Pages are written whole or not at all.
    """
    given = compare_parser().parse(_runs_first(arguments))
    output = None if given.output is None else Path(given.output)
    if output is not None:
        _require_replaceable(output, given.overwrite)
    require(given.samples is None or given.samples >= 0, f"`samples` must be at least 0, got {given.samples}.")
    require(given.samples is None or output is not None, "`samples` is for a page with images. Add --output FILE.html.")
    folders = _distinct(given.run)
    runs = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    if output is None:
        show(sheet_of(runs))
        print("\nWith their images, at equal ids: --output FILE.html.")
        return
    ids = shared_ids(folders, NUM_SHOWN if given.samples is None else given.samples)
    if given.samples is not None:
        _require_shown(runs, ids, given.samples)
    gallery = _gallery(runs, folders, ids)
    _write(sheet_of(runs, gallery, shared=bool(ids) or given.samples == 0), output)
    images = f"{len(gallery.ids)} images of each run" if gallery else "no images"
    print(f"{output}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {images}.")


def _runs_first(arguments: Sequence[str]) -> list[str]:
    """The command line with all folders before all flags; argparse wants them beside each other."""
    runs: list[str] = []
    flags: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        (flags if argument.startswith("-") or before in WITH_VALUES else runs).append(argument)
    return runs + flags


def sheet_of(runs: Sequence[Run], gallery: Gallery | None = None, shared: bool = True) -> Sheet:
    """All that is to be said of some runs.

    Args:
        runs: at least one.
        gallery: their images, if these are to be shown.
        shared: whether there is an id that all of them hold.
    """
    differ, alike = split_settings(runs)
    if len(runs) == 1:  # nothing to fold away: its own table
        differ, alike = alike, []
    settings = [settings_section(runs, differ)] if differ else []
    measured = [*number_sections(runs), cost_section(runs)]
    sections = settings + measured if runs[1:] else measured + settings
    paper = paper_table(runs)
    heads = tuple(run.name for run in runs)
    return Sheet(
        title=enumerated(heads) if len(runs) == 1 else f"{enumerated(heads)}, side by side",
        lines=tuple(_remarks(runs) + ([] if shared else ["There is no id that all runs hold: no images are shown."])),
        tables=(Table(title="Side by side" if runs[1:] else "The run", heads=heads, sections=tuple(sections)),)
        + ((paper,) if paper else ()),
        alike=alike_line(runs, alike),
        gallery=gallery,
    )


def _remarks(runs: Sequence[Run]) -> list[str]:
    """What keeps runs from being compared as they are."""
    found = [
        f"{run.name} holds {run.num_images:,} of {run.num_asked:,} images so far."
        for run in runs
        if run.num_images < run.num_asked
    ]
    for name, means in (("seed", "begin from other noise"), ("labels", "may be of other classes")):
        if len({str(run.settings.get(name)) for run in runs}) > 1:
            found.append(f"The runs differ in {name}: images of one id {means}.")
    sizes = sorted({run.size for run in runs if run.size})
    if len(sizes) > 1:
        found.append(f"The images have {_listed(sizes)} pixels: they are not shown beside each other.")
    return found


# ------------------------------------------------------------------------------------------------------ reading


def _distinct(given: Sequence[str]) -> list[Path]:
    """The folders, each a run.

    Raises:
        UserError: one is none, or is named twice.
    """
    folders: dict[Path, Path] = {}
    for folder in map(Path, given):
        require(is_run(folder), f"`run` must be a folder that sagl sample wrote, and {folder} is none.")
        same = folders.setdefault(folder.resolve(), folder)
        require(same is folder, f"`run` must be different folders, and {folder} is {same} again. Leave one out.")
    return list(folders.values())


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; where two are alike, what was given."""
    short = [folder.resolve().name for folder in folders]
    return [clean(name if short.count(name) == 1 else folder) for name, folder in zip(short, folders, strict=True)]


def _read(folder: Path, name: str) -> Run:
    try:
        record = read_run_json(folder)
    except UserError as error:
        raise UserError(str(error).replace("`output`", "`run`")) from error
    except OSError as error:
        raise UserError(f"`run` {folder} cannot be read: {error.strerror}.") from error
    model, checkpoint, held = record.get("model"), record.get("checkpoint"), count_images(folder)
    network = model or (Path(checkpoint).name if isinstance(checkpoint, str) else None)
    first = next(iter_samples(folder, 1), None)
    height, width = (0, 0) if first is None else pixels(first.pictures[SAMPLES]).shape[:2]
    about = {"model": network, **flat(record["settings"]), "batch_size": record.get("batch_size")}
    return Run(
        name=name,
        folder=str(folder),
        model=model if isinstance(model, str) else None,
        settings={**about, **flat({"versions": record.get("versions", {})})},
        num_images=held,
        num_asked=max(held, int(_number(record, "num_samples") or 0)),
        size=(width, height) if first else None,
        nfe=_number(record, "nfe"),
        seconds=_number(record, "seconds"),
        evaluations=read_evaluations(folder),
    )


def _number(record: dict[str, Any], name: str) -> float | None:
    value = record.get(name)
    sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MOST
    return value if sound else None


def _require_shown(runs: Sequence[Run], ids: Sequence[int], wanted: int) -> None:
    """Refuse images that were asked for and cannot stand beside each other.

    Raises:
        UserError: too few ids are shared, or the images have several sizes.
    """
    require(len(ids) == wanted, f"`samples` must be at most {len(ids)}, the ids that all runs hold, got {wanted}.")
    sizes = sorted({run.size for run in runs if run.size})
    require(
        wanted == 0 or len(sizes) == 1,
        f"`samples` needs images of one size, got {_listed(sizes)}. Give 0, or leave out a run.",
    )


def _listed(sizes: Sequence[tuple[int, int]]) -> str:
    return enumerated([f"{width}×{height}" for width, height in sizes])


def _gallery(runs: Sequence[Run], folders: Sequence[Path], ids: Sequence[int]) -> Gallery | None:
    """The images of these ids; none where there is no id, or the images have several sizes."""
    size = runs[0].size
    if not ids or size is None or any(run.size != size for run in runs):
        return None
    rows = [tuple(sample.pictures[SAMPLES] for sample in get_samples(folder, ids)) for folder in folders]
    return Gallery(names=tuple(run.name for run in runs), ids=tuple(ids), rows=tuple(rows), side=size[0])


# ------------------------------------------------------------------------------------------------------ writing


def _require_replaceable(output: Path, overwrite: bool) -> None:
    """Refuse a page of another kind, and files of somebody else's in its place."""
    ending = output.suffix.lower()
    require(
        ending in HTML + MARKDOWN, f"`output` must be a page, FILE.html or FILE.md, got {output}. Choose one of these."
    )
    for path in (output, *([_picture(output)] if ending in MARKDOWN else [])):
        require(
            overwrite or not path.is_file() or _is_ours(path),
            f"`output` must be new or a page of sagl compare, and {path} is another file. "
            "Choose another name, or give --overwrite.",
        )


def _is_ours(path: Path) -> bool:
    """Whether a file says near its beginning that it was made here."""
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(HEAD)
    except OSError:
        return False


def _picture(page: Path) -> Path:
    """The file of a Markdown page's images."""
    return page.with_suffix(".png")


def _write(sheet: Sheet, output: Path) -> None:
    """The page, and the picture of a Markdown page first."""
    with atomic_file(output) as page:
        if output.suffix.lower() in HTML:
            page.write_text(html_page(sheet), encoding="utf-8")
            return
        page.write_text(markdown(sheet, _picture(output).name), encoding="utf-8")
        if sheet.gallery:
            with atomic_file(_picture(output)) as picture:
                _draw(sheet.gallery, picture)


def _draw(gallery: Gallery, path: Path) -> None:
    """The images as a PNG file that says who made it."""
    import numpy as np
    import torch

    from sagl.sampling.grid import image_grid, save_png

    rows = [torch.from_numpy(np.stack([pixels(p) for p in row])).permute(0, 3, 1, 2) for row in gallery.rows]
    save_png(image_grid(rows), path, software=MARK)
