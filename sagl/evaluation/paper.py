"""The paper's tables and figures as runs of sagl, with the numbers that it prints."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import yaml

from sagl.guidance.registry import GUIDANCES
from sagl.settings.guidance import DEFAULT_KERNEL_SIZE
from sagl.utils.files import packaged_configs

LEFT_OPEN = {"heads", "clip_x0", "checkpoint", "dino_checkpoint"}
"""Settings of guidance methods that the paper does not print."""


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A row of a table of the paper, or a part of a figure."""

    table: str
    """The table's name: "Table 2"."""
    name: str
    """Name that distinguishes the row from the others of its table."""
    model: str
    """Name of the released network."""
    images: int
    """Number of images."""
    steps: int
    """Number of sampling steps, evenly spaced."""
    first_id: int = 0
    """Id of the first image."""
    guidances: Mapping[str, Mapping[str, Any]]
    """Settings by guidance method; a method that is missing is off."""
    values: Mapping[str, float]
    """Printed values: of a table by metric, with Inception's features; empty if none are printed."""

    @property
    def is_unguided(self) -> bool:
        """Return whether all guidance methods are off."""
        return not _active(self)


@dataclass(frozen=True, kw_only=True)
class PaperItem:
    """A table or figure of the paper."""

    name: str
    """Name of its config: table5."""
    title: str
    claim: str
    """Conclusion that the paper draws from it."""
    analysis: str | None
    """Name of the analysis of `sagl analyze` that makes it; None for runs that are sampled and evaluated."""
    shows_samples: bool
    """True for a figure of unselected samples."""
    rows: tuple[PaperRow, ...]

    @property
    def heading(self) -> str:
        """Its name in the paper: "Table 5"."""
        return re.sub(r"(\D+)(\d+)", lambda match: f"{match[1].capitalize()} {match[2]}", self.name)


@cache
def paper_items() -> Mapping[str, PaperItem]:
    """Return all tables and figures by name, tables first, by their numbers."""
    paths = {path.stem: path for path in (packaged_configs() / "paper").glob("*.yaml")}
    names = sorted(paths, key=lambda name: (name.startswith("figure"), int(re.sub(r"\D", "", name))))
    return {name: _parse(name, yaml.safe_load(paths[name].read_bytes())) for name in names}


def _parse(name: str, content: Mapping[str, Any]) -> PaperItem:
    item = PaperItem(
        name=name,
        title=content["title"],
        claim=content["claim"],
        analysis=content.get("analysis"),
        shows_samples=content.get("samples", False),
        rows=(),
    )
    rows = []
    for group in content["groups"]:
        common = {key: group[key] for key in ("model", "images", "steps", "first_id") if key in group}
        for row in group["rows"]:
            guidances = {key: {**group.get(key, {}), **row.get(key, {})} for key in GUIDANCES}
            values = {str(key): value for key, value in row["numbers"].items()}
            rows.append(
                PaperRow(**common, table=item.heading, name=str(row["name"]), guidances=guidances, values=values)
            )
    return replace(item, rows=tuple(rows))


@cache
def paper_rows() -> tuple[PaperRow, ...]:
    """Return the rows of metrics of all tables; rows that several tables share are one, with all tables named."""
    rows: dict[str, PaperRow] = {}
    for item in paper_items().values():
        for row in item.rows if item.analysis is None else ():
            key = json.dumps([row.model, row.images, _active(row), row.values], sort_keys=True)
            if row.values:
                rows[key] = replace(row, table=_join_tables(rows[key].table, row.table)) if key in rows else row
    return tuple(rows.values())


def _join_tables(names: str, name: str) -> str:
    """Append a table's number: ("Table 4", "Table 5") -> "Tables 4, 5"."""
    return f"{names.replace('Table ', 'Tables ')}, {name.removeprefix('Table ')}"


def _active(row: PaperRow) -> dict[str, Mapping[str, Any]]:
    return {name: settings for name, settings in row.guidances.items() if settings.get("scale")}


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
