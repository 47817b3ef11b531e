"""`sagl export`: files for people and other programs from the shards of a run."""

from pathlib import Path

from sagl.commands.parser import Parser
from sagl.errors import UserError, require
from sagl.sampling.run_folder import count_images, read_run_json


def export_parser() -> Parser:
    """The flags."""
    p = Parser("export", "Make a grid, images or an npz from the shards of a run.")
    p.add_argument("run", type=str, help="Folder that sagl sample wrote.")
    p.add_argument("--npz", type=str, default=None, help="File for arr_0 (N, H, W, 3) uint8 and arr_1, the labels.")
    p.add_argument("--images", type=str, default=None, help="Folder for one PNG a sample.")
    p.add_argument("--grid", type=str, default=None, help="PNG of the first samples, with what they are compared to.")
    p.add_argument("--num_samples", type=int, default=None, help="Only so many, the first; default: all.")
    return p


def main(arguments: list[str]) -> None:
    """Export: `sagl export RUN [--npz FILE] [--images DIR] [--grid FILE]`.

    Raises:
        UserError: no run, a damaged one, or nothing asked for; files are written whole or not at all.
    """
    given = export_parser().parse(arguments)
    run = Path(given.run)
    require(count_images(run) > 0, f"`run` must be the folder of a run, with images, and {run} is none.")
    require(bool(given.npz or given.images or given.grid), "`export` needs --npz FILE, --images DIR or --grid FILE.")
    there = count_images(run)
    wanted = there if given.num_samples is None else given.num_samples
    require(1 <= wanted <= there, f"`num_samples` must be 1 … {there} for {run}, got {wanted}.")
    asked = read_run_json(run).get("num_samples", there)
    if asked > there:
        print(f"{run} holds {there} of {asked} images so far.")
    from sagl.sampling.exports import write_grid, write_images, write_npz

    for name, write in (("grid", write_grid), ("images", write_images), ("npz", write_npz)):
        if (path := given[name]) is not None:
            try:
                write(run, Path(path), wanted)
            except UserError as error:
                raise UserError(str(error).replace("`output`", f"`{name}`")) from error
            print(f"{path}: made of {wanted} images.")
