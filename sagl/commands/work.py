"""Flags of the commands that look at images by an extractor."""

from dataclasses import dataclass
from typing import Literal

from jsonargparse import Namespace

from sagl.commands.parser import Parser
from sagl.errors import require
from sagl.settings.evaluation import DEFAULT_EXTRACTOR, EXTRACTOR_NAMES, require_extractor
from sagl.settings.sampling import DeviceSettings
from sagl.utils.distributed import require_launcher

Progress = Literal["auto", "bar", "lines", "off"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """How sets of images are looked at."""

    extractor: str
    image_size: int | None
    """To which pictures are cut; None: as they are."""
    batch_size: int
    device: DeviceSettings
    progress: Progress


def add_work_flags(p: Parser, *, of_reference: bool = False) -> None:
    """Those that say how, and on what, images are looked at.

    Args:
        p: the parser.
        of_reference: whether a file of statistics decides the extractor where none is given.
    """
    left_open = f" (default: a file of statistics its own, else {DEFAULT_EXTRACTOR})" if of_reference else ""
    p.add_argument(
        "--extractor",
        type=str,
        default=None if of_reference else DEFAULT_EXTRACTOR,
        help=f"{', '.join(EXTRACTOR_NAMES)}, or package.function of yours{left_open}.",
    )
    p.add_argument("--image_size", type=int, default=None, help="Side of the squares that pictures are cut to.")
    p.add_argument("--batch_size", type=int, default=100, help="Images that a process looks at together.")
    p.add_argument("--progress", type=Progress, default="auto", help="auto: a bar on a terminal, else lines.")
    accelerators = Literal["auto", "cpu", "gpu"]
    p.add_argument("--trainer.accelerator", type=accelerators, default="auto", help="auto: a GPU where there is one.")
    p.add_argument("--trainer.devices", type=str, default="auto", help="Processes a node; auto: one a GPU.")
    p.add_argument("--trainer.num_nodes", type=int, default=1, help="Machines, under torchrun or SLURM.")


def work_of(given: Namespace) -> Work:
    """From the flags above.

    Raises:
        UserError: there is no such number of images or processes.
    """
    for name in ("batch_size", "image_size"):
        value = given[name]
        require(value is None or value >= 1, f"`{name}` must be at least 1, got {value}.")
    require_extractor(given.extractor)
    trainer = given.trainer
    device = DeviceSettings(accelerator=trainer.accelerator, devices=trainer.devices, num_nodes=trainer.num_nodes)
    require_launcher(device)
    return Work(
        extractor=given.extractor,
        image_size=given.image_size,
        batch_size=given.batch_size,
        device=device,
        progress=given.progress,
    )
