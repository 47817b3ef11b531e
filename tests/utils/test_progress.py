from itertools import pairwise
from types import SimpleNamespace

import pytest

from sagl.utils import progress
from sagl.utils.progress import LINES_EVERY_SECONDS, show_progress

KINDS = ["auto", "bar", "lines", "off"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when it is told."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def lines_of(clock, capsys, seconds_a_batch, batches=4, batch=5):
    """The lines that are printed while batches are made."""
    with show_progress("lines", "guided", batch * batches) as watch:
        for _ in range(batches):
            clock.seconds += seconds_a_batch
            watch.images(batch)
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_goes_through_unchanged_and_no_step_ahead(kind):
    taken = []
    with show_progress(kind, "guided", 2) as watch:
        for item in watch.steps((taken.append(k) or k for k in range(3)), 3):
            assert taken[-1] == item
        watch.images(2)
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_that_fails_is_not_hidden(kind):
    def failing():
        yield 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), show_progress(kind, "guided", 2) as watch:
        list(watch.steps(failing(), 3))


def test_a_line_says_how_many_how_fast_and_how_long(clock, capsys):
    assert lines_of(clock, capsys, seconds_a_batch=40.0) == [
        "guided: 5/20 images, 0.12/s, 120 s left",
        "guided: 10/20 images, 0.12/s, 80 s left",
        "guided: 15/20 images, 0.12/s, 40 s left",
        "guided: 20/20 images, 0.12/s",
    ]


def test_of_quick_batches_the_first_and_the_last_have_a_line(clock, capsys):
    lines = lines_of(clock, capsys, seconds_a_batch=0.5)
    assert [line.split()[1] for line in lines] == ["5/20", "20/20"]


def test_lines_are_no_closer_than_said(clock, capsys):
    lines = lines_of(clock, capsys, seconds_a_batch=LINES_EVERY_SECONDS / 3, batches=10, batch=1)
    done = [int(line.split()[1].split("/")[0]) for line in lines]
    assert done[-1] == 10
    between = [b - a for a, b in pairwise(done)]
    assert min(between[:-1]) == max(between[:-1]) == 3


def test_batches_that_take_no_time_do_no_harm(clock, capsys):
    assert lines_of(clock, capsys, seconds_a_batch=0.0)[-1].startswith("guided: 20/20 images")


def test_off_says_nothing(capsys):
    with show_progress("off", "guided", 5) as watch:
        watch.images(5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kind", "terminal", "bar"), [("auto", True, True), ("auto", False, False), ("bar", False, True)]
)
def test_auto_is_a_bar_on_a_terminal_and_lines_elsewhere(kind, terminal, bar, monkeypatch):
    monkeypatch.setattr(progress.Console, "is_terminal", terminal)
    with show_progress(kind, "guided", 5) as watch:
        assert isinstance(watch, progress.RichProgress if bar else progress.LogProgress)


def test_the_bars_count_images_outside_and_the_steps_of_each_chain_inside():
    with show_progress("bar", "guided", 6) as watch:
        outer, inner = watch.bars.tasks
        for chain in range(2):
            for step, _ in enumerate(watch.steps(iter(range(4)), 4)):
                assert (inner.completed, inner.total) == (step + 1, 4)
            watch.images(3)
            assert (outer.completed, outer.total, outer.description) == (3 * chain + 3, 6, "guided")
