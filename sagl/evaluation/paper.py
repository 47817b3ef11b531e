"""Numbers of the paper's tables, and the selection of those that belong to a run."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sagl.guidance.registry import GUIDANCES
from sagl.settings.guidance import DEFAULT_KERNEL_SIZE

LEFT_OPEN = {"heads", "clip_x0", "checkpoint", "dino_checkpoint"}
"""Settings of guidance methods that the paper does not print."""


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A row of a table of the paper."""

    table: str
    """The table's number: "Table 2"."""
    model: str
    """Name of the released network."""
    images: int
    """Number of images evaluated."""
    steps: int
    """Number of sampling steps, evenly spaced."""
    guidances: Mapping[str, Mapping[str, Any]]
    """Settings by guidance method; a method that is missing is off."""
    values: Mapping[str, float]
    """Values by metric, with Inception's features."""


@cache
def paper_rows() -> tuple[PaperRow, ...]:
    """Return all rows whose settings a run can have."""
    groups = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_bytes())
    return tuple(_parse(group, row) for group in groups for row in group["rows"])


def _parse(group: Mapping[str, Any], row: Mapping[str, Any]) -> PaperRow:
    common = {name: group[name] for name in ("table", "model", "images", "steps")}
    guidances = {name: {**group.get(name, {}), **row.get(name, {})} for name in GUIDANCES}
    return PaperRow(**common, guidances=guidances, values=row["numbers"])


def matching_rows(model: str | None, settings: Mapping[str, Any]) -> list[PaperRow]:
    """Return the rows with a run's network and guidance. Sampling steps and number of images may differ.

    Args:
        model: name of the run's network; None for the user's own.
        settings: the run's settings by full names ("sag.scale").
    """
    return [row for row in paper_rows() if row.model == model and _has_guidance(row, settings)]


def _has_guidance(row: PaperRow, settings: Mapping[str, Any]) -> bool:
    """Return whether the scales agree with the row, and the other settings of active methods.

    A setting that the row does not list must have its default, apart from those of `LEFT_OPEN`.
    """
    for name, entry in GUIDANCES.items():
        defaults = {f.name: f.default for f in fields(entry.settings_class) if f.name not in LEFT_OPEN}
        expected = defaults | {"kernel_size": DEFAULT_KERNEL_SIZE} | dict(row.guidances.get(name, {}))
        actual = {setting: settings.get(f"{name}.{setting}", defaults.get(setting)) for setting in expected}
        actual = {setting: tuple(v) if isinstance(v, list) else v for setting, v in actual.items()}
        actual["kernel_size"] = actual["kernel_size"] or DEFAULT_KERNEL_SIZE  # fits images of 128 pixels
        if actual["scale"] != expected["scale"] or (expected["scale"] and actual != expected):
            return False
    return True
