"""Figures by matplotlib (extra `plots`): one style, opaque white, so that they are legible on light and dark pages."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagl.errors import UserError
from sagl.utils.files import atomic_file

STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2,
    "image.interpolation": "nearest",
}


@contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (4, 4)) -> Iterator[Any]:
    """Draw into a new figure, and write it as PNG.

    Args:
        path: the file.
        rows: rows of axes.
        columns: columns of axes.
        size: width and height of each axes in inches.

    Yields:
        The figure, and its axes as an array (rows, columns).

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("`analyze` needs matplotlib: pip install 'sagl[plots]'") from error
    with mpl.rc_context(STYLE):
        fig: Figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        yield fig, fig.subplots(rows, columns, squeeze=False)
        with atomic_file(path) as partial:
            fig.savefig(partial, format="png")


def show_image(axes: Any, image: Any, title: str = "", **options: Any) -> Any:  # noqa: ANN401 (matplotlib's objects)
    """Show an image, (C, H, W) uint8 or (H, W), without ticks; return matplotlib's image."""
    image = image.expand(3, -1, -1).permute(1, 2, 0) if image.ndim == 3 else image
    axes.set(xticks=[], yticks=[], title=title)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes.imshow(image.numpy(), **options)


def tint(image: Tensor, mask: Tensor) -> Tensor:
    """Color the masked pixels of an image orange, half transparent: (C, H, W) uint8, (H, W) bool -> (3, H, W) uint8."""
    orange = torch.tensor([255.0, 120.0, 0.0])[:, None, None]
    return torch.where(mask, (image + orange) / 2, image.float().expand(3, -1, -1)).byte()
