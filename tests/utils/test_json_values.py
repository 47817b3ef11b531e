"""Dataclasses from JSON values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from sagl.utils.json_values import from_json
from tests.helpers.errors import refused


@dataclass(frozen=True)
class Example:
    number: float = 0.5
    count: int = 1
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    interval: tuple[float, float] = (0.0, 1.0)
    values: Mapping[str, float] = field(default_factory=dict)
    anything: Any = None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("number", 2, 2),
        ("number", -1.5, -1.5),
        ("name", None, None),
        ("name", "x", "x"),
        ("kind", "b", "b"),
        ("sizes", [1, 2], (1, 2)),
        ("sizes", [], ()),
        ("interval", [0, 0.5], (0, 0.5)),
        ("values", {"fd": 1}, {"fd": 1}),
        ("anything", [{"a": None}], [{"a": None}]),
    ],
)
def test_values_of_the_annotated_type_are_taken_and_lists_become_tuples(name, value, expected):
    assert getattr(from_json(Example, {name: value}), name) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number", "2"),
        ("number", True),
        ("number", float("nan")),
        ("number", float("inf")),
        ("number", 10**400),
        ("count", 1.0),
        ("count", True),
        ("count", None),
        ("name", 3),
        ("kind", "c"),
        ("sizes", 3),
        ("sizes", [1, "2"]),
        ("sizes", "12"),
        ("interval", [0.0]),
        ("interval", [0.0, 0.5, 1.0]),
        ("values", [1.0]),
        ("values", {"fd": "1"}),
    ],
)
def test_other_values_are_refused_with_their_name(name, value):
    with refused(f"`{name}`", repr(value)[:20]):
        from_json(Example, {name: value})


def test_other_names_are_a_type_error():
    with pytest.raises(TypeError, match="colour"):
        from_json(Example, {"colour": 1})
