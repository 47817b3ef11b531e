"""Numbers of the paper's tables, and the selection of those that belong to a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sagl.guidance.registry import GUIDANCES
from sagl.settings.guidance import DEFAULT_KERNEL_SIZE


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
    """Return whether the scales agree with the row, and all settings that it lists for active methods."""
    for name in GUIDANCES:
        expected = row.guidances.get(name, {})
        scale = expected.get("scale", 0)
        if settings.get(f"{name}.scale", 0) != scale:
            return False
        actual = {setting: settings.get(f"{name}.{setting}") for setting in expected}
        if "kernel_size" in actual:
            actual["kernel_size"] = actual["kernel_size"] or DEFAULT_KERNEL_SIZE  # fits images of 128 pixels
        in_all_steps = settings.get(f"{name}.interval", (0, 1)) in ([0, 1], (0, 1))
        if scale and not (in_all_steps and actual == dict(expected)):
            return False
    return True
