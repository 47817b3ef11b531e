"""`sagl export`: grid, images or npz file from the shards of a run."""

from pathlib import Path
from zipfile import ZipFile, is_zipfile

from sagl.configuration.parser import Parser
from sagl.errors import require
from sagl.sampling.run_folder import count_images, read_run_json
from sagl.utils.run_lock import lock_file, lock_folder


def export_parser() -> Parser:
    p = Parser("export", "Write a grid, single images or an npz file from the shards of a run.")
    p.add_argument("run", type=str, help="Run folder of sagl sample.")
    p.add_argument("--npz", type=str, default=None, help="File for arr_0 (N, H, W, 3) uint8 and arr_1, the labels.")
    p.add_argument("--images", type=str, default=None, help="Folder for one PNG per sample.")
    p.add_argument("--grid", type=str, default=None, help="PNG of the first samples and the images to compare with.")
    p.add_argument("--num_samples", type=int, default=None, help="Number of samples, the first ones; default: all.")
    return p


def main(arguments: list[str]) -> None:
    """Run `sagl export RUN [--npz FILE] [--images DIR] [--grid FILE]`.

    Raises:
        UserError: there is no run, it is damaged, or no export is requested; files are written whole or not at all.
    """
    flags = export_parser().parse(arguments)
    run = Path(flags.run)
    count = count_images(run)
    require(count > 0, f"`run` must be a run folder with images, and {run} is none.")
    require(
        any((flags.npz, flags.images, flags.grid)),
        "an export must be requested: `npz` FILE, `images` DIR, `grid` FILE.",
    )
    num_samples = count if flags.num_samples is None else flags.num_samples
    require(1 <= num_samples <= count, f"`num_samples` must be 1 … {count} for {run}, got {num_samples}.")
    num_requested = read_run_json(run).get("num_samples", count)
    if num_requested > count:
        print(f"{run} has {count} of {num_requested} images so far.")
    _check_files(flags.grid, flags.npz)
    from sagl.sampling.exports import GRID_SAMPLES, require_no_other_images, write_grid, write_images, write_npz

    if flags.images is not None:
        require_no_other_images(run, Path(flags.images), num_samples, "images")
    for name, write in (("grid", write_grid), ("images", write_images), ("npz", write_npz)):
        if (path := flags[name]) is not None:
            with (lock_folder if name == "images" else lock_file)(Path(path), name):
                write(run, Path(path), num_samples, argument=name)
            print(f"{path}: {min(num_samples, GRID_SAMPLES) if name == 'grid' else num_samples} images.")


def _check_files(grid: str | None, npz: str | None) -> None:
    """Refuse to replace what is no export.

    Raises:
        UserError: an existing npz file has no images, or the name of a file has another suffix than its format.
    """
    for name, file, suffix in (("grid", grid, ".png"), ("npz", npz, ".npz")):
        require(file is None or Path(file).suffix == suffix, f"`{name}` must be a file {suffix}, got {file}.")
    if npz is not None and Path(npz).is_file():
        names = ZipFile(npz).namelist() if is_zipfile(npz) else []
        require("arr_0.npy" in names, f"`npz` {npz} exists and is no export of images. Choose another name.")
