"""Errors of users."""

from contextlib import contextmanager

import pytest

from sagl.errors import UserError


@contextmanager
def refused(*parts):
    """Require a `UserError` of one line with these parts: the argument, the value."""
    with pytest.raises(UserError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in map(str, parts) if part not in message] == []
