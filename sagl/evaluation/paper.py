"""The paper's numbers, and which of them belongs beside a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sagl.settings.guidance import DEFAULT_KERNEL_SIZE

FIGURES = Path(__file__).with_name("paper.yaml")


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One row of a table of the paper."""

    table: str
    """That prints it: "Table 2"."""
    model: str
    """Name of the released network."""
    images: int
    """That the numbers were measured of."""
    steps: int
    """Of the chain, evenly spaced."""
    sag: Mapping[str, Any]
    """Settings of self-attention guidance, of which only `scale` counts where that is 0."""
    classifier: float = 0.0
    """Scale of classifier guidance."""
    numbers: Mapping[str, float]
    """By metric, measured with Inception."""


@cache
def paper_rows() -> tuple[PaperRow, ...]:
    """All rows that a run of sagl can be like."""
    return tuple(_row(group, row) for group in yaml.safe_load(FIGURES.read_text()) for row in group["rows"])


def rows_like(model: str | None, settings: Mapping[str, Any]) -> list[PaperRow]:
    """The rows of a run's network and guidance; steps and number of images may be others.

    Args:
        model: name of the run's network; None for one of the user's own.
        settings: the run's, by full names ("sag.scale").
    """
    if settings.get("cfg.scale"):
        return []
    return [row for row in paper_rows() if row.model == model and _guided_like(row, settings)]


def _row(group: Mapping[str, Any], row: Mapping[str, Any]) -> PaperRow:
    shared = {name: group[name] for name in ("table", "model", "images", "steps")}
    sag = {**group.get("sag", {}), **row.get("sag", {})}
    return PaperRow(**shared, sag=sag, classifier=row.get("classifier", 0.0), numbers=row["numbers"])


def _guided_like(row: PaperRow, settings: Mapping[str, Any]) -> bool:
    """Whether the scales are the row's, and where they are not 0 all that the paper's table 7 lists as well."""
    scales = settings.get("sag.scale", 0), settings.get("classifier.scale", 0)
    if scales != (row.sag["scale"], row.classifier):
        return False
    found = {name: settings.get(f"sag.{name}") for name in row.sag}
    found["kernel_size"] = (
        settings.get("sag.kernel_size") or DEFAULT_KERNEL_SIZE
    )  # that fits images of 128 pixels and more
    every_step = settings.get("sag.interval") in ([0, 1], (0, 1))
    return not row.sag["scale"] or (every_step and all(found[name] == value for name, value in row.sag.items()))
