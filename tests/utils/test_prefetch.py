from threading import Event, current_thread

import pytest
import torch

from sagl.utils.prefetch import pin, prefetch, to_device

WAIT = 60
"""Seconds after which a thread that should have come counts as stuck."""


def test_values_are_those_of_the_iterable_in_order_and_computed_in_other_threads():
    threads = []

    def values():
        for value in range(5):
            threads.append(current_thread())
            yield value

    assert list(prefetch(values())) == [0, 1, 2, 3, 4]
    assert current_thread() not in threads
    assert list(prefetch(())) == []


def test_the_next_value_is_computed_while_the_last_one_is_used_and_no_further_one():
    begun = [Event() for _ in range(4)]

    def values():
        for event in begun:
            event.set()
            yield

    ahead = prefetch(values())
    for k in range(3):
        assert begun[k].wait(WAIT)  # before anybody asks for it
        assert not begun[k + 1].is_set()
        next(ahead)


def test_an_exception_is_raised_where_its_value_is_asked_for():
    def values():
        yield 1
        raise ValueError("second")

    ahead = prefetch(values())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="second"):
        next(ahead)


def test_a_tensor_on_its_device_is_not_copied():
    x, cpu = torch.zeros(2), torch.device("cpu")
    assert to_device(x, cpu) is pin(x, cpu) is x
    assert to_device(x, torch.device("meta")).device.type == "meta"
