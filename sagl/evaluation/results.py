"""evaluation.json in a run's folder: what `sagl evaluate` measured of its images, one entry a measurement."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sagl.errors import UserError
from sagl.utils.files import atomic_file

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
    reference_digest: str = ""
    """Tells references of one name apart; see `image_sets.identity`."""
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
    deviations: Mapping[str, float] = field(default_factory=dict)
    """Over subsets, of the kernel distance."""
    notes: tuple[str, ...] = ()
    """What a reader must know of these numbers."""
    images: str = ""
    """What was measured."""
    seconds: float = 0.0

    @property
    def written(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {"images": self.images, **{name: value for name, value in asdict(self).items() if name != "images"}}

    def replaces(self, other: "Evaluation") -> bool:
        """Whether it is the same measurement, made again."""
        return all(getattr(self, name) == getattr(other, name) for name in SAME)


SAME = ("extractor", "reference", "reference_digest", "num_samples", "num_reference", "settings")
"""What makes two measurements of one run the same."""


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


def save_result(folder: Path, made: Evaluation) -> None:
    """Add a measurement to the run's file, in place of an older one of the same kind.

    Raises:
        UserError: the file is damaged, or cannot be written.
    """
    others = [evaluation for evaluation in read_evaluations(folder) if not made.replaces(evaluation)]
    with atomic_file(folder / EVALUATIONS) as partial:
        entries = [evaluation.written for evaluation in (*others, made)]
        partial.write_text(json.dumps({"evaluations": entries}, indent=2) + "\n")


def _evaluation(entry: Mapping[str, Any]) -> Evaluation:
    num_reference, resize = entry.get("num_reference"), entry.get("resize") or ""
    return Evaluation(
        extractor=_a(str, entry["extractor"]),
        reference=_a(str, entry["reference"]),
        reference_digest=_a(str, entry.get("reference_digest") or ""),
        num_samples=_a(int, entry["num_samples"]),
        num_reference=None if num_reference is None else _a(int, num_reference),
        resize=_a(str, resize),
        numbers={name: _number(value) for name, value in entry["numbers"].items() if value is not None},
        intervals={name: _ends(value) for name, value in (entry.get("intervals") or {}).items() if value is not None},
        settings=dict((entry.get("settings") or {}).items()),
        deviations={name: _number(value) for name, value in (entry.get("deviations") or {}).items()},
        notes=tuple(_a(str, note) for note in entry.get("notes") or ()),
        images=_a(str, entry.get("images") or ""),
        seconds=_number(entry.get("seconds") or 0.0),
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
