"""The one exception that is a message to the user rather than a defect."""


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
