"""evaluation.json in a run's folder: what `sagl evaluate` measured of its images, one entry a measurement."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagl.settings.errors import UserError

EVALUATIONS = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Numbers of one measurement, and all that they depend on besides the images."""

    extractor: str
    """Of the features; numbers of different ones are never compared."""
    reference: str
    """What was measured from."""
    num_samples: int
    """Images measured, the run's first."""
    num_reference: int | None = None
    """Images of the reference, where that is known."""
    resize: str = ""
    """How images came to the extractor's size."""
    numbers: Mapping[str, float]
    """By metric: fid, sfid, fd, is, is_all, precision, recall, kid, kd."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Low and high end, of the metrics that have one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the metrics: neighbours, chunks, subsets."""


def read_evaluations(folder: Path) -> tuple[Evaluation, ...]:
    """The run's measurements, the oldest first; none where it was not measured.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / EVALUATIONS
    if not path.is_file():
        return ()
    try:
        return tuple(_evaluation(entry) for entry in json.loads(path.read_text())["evaluations"])
    except (OSError, ValueError, LookupError, OverflowError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"`run` must hold a whole {EVALUATIONS}, and {path} is damaged. Delete it; sagl evaluate makes it again."
        ) from error


def _evaluation(entry: Mapping[str, Any]) -> Evaluation:
    num_reference, resize = entry.get("num_reference"), entry.get("resize") or ""
    return Evaluation(
        extractor=_a(str, entry["extractor"]),
        reference=_a(str, entry["reference"]),
        num_samples=_a(int, entry["num_samples"]),
        num_reference=None if num_reference is None else _a(int, num_reference),
        resize=_a(str, resize),
        numbers={name: _number(value) for name, value in entry["numbers"].items() if value is not None},
        intervals={name: _ends(value) for name, value in (entry.get("intervals") or {}).items() if value is not None},
        settings=dict((entry.get("settings") or {}).items()),
    )


def _a(kind: type, value: Any) -> Any:  # noqa: ANN401 (what JSON holds)
    """The value, if it is of that kind.

    Raises:
        TypeError: it is of another.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r:.60} is no {kind.__name__}")
    return value


def _number(value: Any) -> float:  # noqa: ANN401
    found = float(_a(float if isinstance(value, float) else int, value))
    if not math.isfinite(found):
        raise ValueError(f"{value} is not finite")
    return found


def _ends(value: Any) -> tuple[float, float]:  # noqa: ANN401
    low, high = value
    return _number(low), _number(high)
