"""The one exception that is a message to the user rather than a defect, and what raises it."""

import math


class UserError(ValueError):
    """A request that cannot be met: names the argument, what is allowed, what came and the way out.

    The command line turns it into one line and exit code 2; every other exception keeps its traceback.
    """


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds.

    Raises:
        UserError: the condition is false.
    """
    if not condition:
        raise UserError(message)


def require_finite(settings: object, prefix: str = "") -> None:
    """Refuse a settings object that holds nan or an infinity.

    Raises:
        UserError: names the first such field, behind `prefix`.
    """
    for name, value in vars(settings).items():
        numbers = value if isinstance(value, tuple) else (value,)
        wrong = [number for number in numbers if isinstance(number, float) and not math.isfinite(number)]
        require(not wrong, f"`{prefix}{name}` must be a finite number, got {wrong and wrong[0]}.")
