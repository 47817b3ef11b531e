"""The exception for requests that cannot be met, and checks that raise it."""

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Literal, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """A request that cannot be met. The message names the parameter, what is allowed, the value, and what to do.

    The command line prints it as one line and exits with code 2; every other exception keeps its traceback.
    """


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds.

    Raises:
        UserError: The condition is false.
    """
    if not condition:
        raise UserError(message)


def require_range(name: str, value: float, smallest: float, largest: float) -> None:
    """Raise a `UserError` unless a parameter lies between two limits, both included."""
    require(smallest <= value <= largest, f"`{name}` must be in {smallest} … {largest}, got {value}.")


def require_seed(name: str, value: int) -> None:
    """Raise a `UserError` unless numpy and torch both take a number as a seed."""
    require(0 <= value < 2**63, f"`{name}` must be in 0 … 2⁶³ - 1, got {value!s:.60}.")


def whole_number(text: str) -> int | None:
    """Return the number that a text writes in ASCII digits; None for another text, and for more than 18 digits."""
    digits = text.strip()
    return int(digits) if re.fullmatch(r"[0-9]{1,18}", digits) else None


def require_finite(settings: object, prefix: str = "") -> None:
    """Refuse settings that contain nan or infinity.

    Raises:
        UserError: Names the first such field, with `prefix` before it.
    """
    for name, value in vars(settings).items():
        for number in value if isinstance(value, tuple) else (value,):
            finite = not isinstance(number, float) or math.isfinite(number)
            require(finite, f"`{prefix}{name}` must be a finite number, got {number}.")


def require_choices(settings: object, prefix: str = "") -> None:
    """Refuse settings whose type is a `Literal` that does not contain their value.

    Raises:
        UserError: Names the first such field, with `prefix` before it.
    """
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal:
            choices, value = get_args(hint), getattr(settings, name)
            require(value in choices, f"`{prefix}{name}` must be one of {', '.join(choices)}, got {value!r}.")


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Return " Did you mean …?" with the most similar candidate, or an empty string if none is similar.

    The first candidate with the name as its last part goes before all others: scale -> sag.scale.
    """
    candidates = list(candidates)
    by_last_part = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
    same = [candidate for candidate in candidates if candidate.rsplit(".", 1)[-1] == name]
    similar = (
        same
        or get_close_matches(name, candidates, n=1, cutoff=0.6)
        or [by_last_part[part] for part in get_close_matches(name.rsplit(".", 1)[-1], by_last_part, n=1, cutoff=0.7)]
    )
    return f" Did you mean {similar[0]}?" if similar else ""
