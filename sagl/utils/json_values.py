"""Dataclasses from JSON values, whose types are checked against the annotations; floats as JSON values."""

import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sagl.errors import UserError

T = TypeVar("T")


def from_json(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass from the values of a JSON object; lists become tuples, and an integer is accepted for a float.

    Raises:
        UserError: a value is not allowed, or of another type.
        TypeError: the values have other names.
    """
    hints = get_type_hints(cls)
    return cls(**{name: _convert_field(name, value, hints.get(name, Any)) for name, value in values.items()})


def finite_or_none(value: float) -> float | None:
    """Return a finite number, and None for infinity and nan, which JSON does not have."""
    return value if math.isfinite(value) else None


def _convert_field(name: str, value: Any, hint: Any) -> Any:  # noqa: ANN401 (any JSON value, any type)
    try:
        return _convert(value, hint)
    except (TypeError, ValueError) as error:
        type_name = getattr(hint, "__name__", str(hint))
        raise UserError(f"`{name}` must be {type_name}, got {value!r:.60}.") from error


def _convert(value: Any, hint: Any) -> Any:  # noqa: ANN401
    """Check a JSON value against a type, and return it with lists as tuples.

    Raises:
        TypeError, ValueError: it is of another type, or a number that no finite float can hold.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or (origin is Literal and value in args):
        return value
    if origin in (UnionType, Union):
        for arg in args:
            with suppress(TypeError, ValueError):
                return _convert(value, arg)
    if origin is tuple and isinstance(value, list | tuple):
        items = [args[0]] * len(value) if args[-1] is ... else args
        return tuple(_convert(item, item_hint) for item, item_hint in zip(value, items, strict=True))
    if origin is Mapping and isinstance(value, Mapping):
        return {name: _convert(item, args[1]) for name, item in value.items()}
    if hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # not so for nan
        return value
    if hint is not float and type(value) is hint:
        return value
    raise TypeError(f"{value!r:.60} is no {hint}")
