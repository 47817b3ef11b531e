from itertools import pairwise
from types import SimpleNamespace

import pytest

from sagl.utils import progress
from sagl.utils.progress import LINE_INTERVAL_SECONDS, ProgressReporter

KINDS = ["auto", "bar", "lines", "off"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def printed_lines(clock, capsys, seconds_per_batch, num_batches=4, batch_size=5):
    with ProgressReporter("guided", batch_size * num_batches, "lines") as reporter:
        for _ in range(num_batches):
            clock.seconds += seconds_per_batch
            reporter.advance(batch_size)
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_passed_on_one_at_a_time(kind):
    produced = []
    with ProgressReporter("guided", 2, kind) as reporter:
        for item in reporter.track_steps((produced.append(k) or k for k in range(3)), 3):
            assert produced[-1] == item
        reporter.advance(2)
    assert produced == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_inside_the_steps_is_passed_on(kind):
    def failing_steps():
        yield 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), ProgressReporter("guided", 2, kind) as reporter:
        list(reporter.track_steps(failing_steps(), 3))


def test_a_line_has_count_rate_and_remaining_time(clock, capsys):
    assert printed_lines(clock, capsys, seconds_per_batch=40.0) == [
        "guided: 5/20 images, 0.12/s, 0:02:00 left",
        "guided: 10/20 images, 0.12/s, 0:01:20 left",
        "guided: 15/20 images, 0.12/s, 0:00:40 left",
        "guided: 20/20 images, 0.12/s",
    ]


def test_what_an_earlier_command_has_done_does_not_count_as_speed(clock, capsys):
    with ProgressReporter("file.pt", kind="lines", unit="bytes") as reporter:
        reporter.update(90_000_000, 100_000_000)
        clock.seconds += LINE_INTERVAL_SECONDS
        reporter.update(95_000_000)
    rate = 5 / LINE_INTERVAL_SECONDS
    assert f"{rate:.1f} MB/s, 0:00:{LINE_INTERVAL_SECONDS:.0f} left" in capsys.readouterr().err.splitlines()[-1]


def test_lines_keep_their_interval_except_for_the_first_and_the_last(clock, capsys):
    lines = printed_lines(clock, capsys, LINE_INTERVAL_SECONDS / 3, num_batches=10, batch_size=1)
    counts = [int(line.split()[1].split("/")[0]) for line in lines]
    assert (counts[0], counts[-1]) == (1, 10)
    assert {b - a for a, b in pairwise(counts[:-1])} == {3}


def test_batches_that_take_no_time_are_no_division_by_zero(clock, capsys):
    assert "20/20" in printed_lines(clock, capsys, seconds_per_batch=0.0)[-1]


def test_bytes_are_shown_in_megabytes_with_the_total_once_it_is_known(clock, capsys):
    with ProgressReporter("file.pt", kind="lines", unit="bytes") as reporter:
        for completed, total in ((1_000_000, None), (2_000_000, 4_000_000), (4_000_000, 4_000_000)):
            clock.seconds += LINE_INTERVAL_SECONDS
            reporter.update(completed, total)
    first, second, last = capsys.readouterr().err.splitlines()
    assert ("1.0/?" in first, "2.0/4.0 MB" in second, "4.0/4.0 MB" in last) == (True, True, True)


def test_off_prints_nothing(capsys):
    with ProgressReporter("guided", 5, "off") as reporter:
        reporter.advance(5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("is_terminal", "kind"), [(True, "bar"), (False, "lines")])
def test_auto_is_a_bar_on_a_terminal_and_lines_elsewhere(is_terminal, kind, monkeypatch):
    monkeypatch.setattr(progress.Console, "is_terminal", is_terminal)
    assert ProgressReporter("guided", 5, "auto").kind == kind


def test_the_bars_show_the_images_and_the_steps_of_the_current_batch():
    with ProgressReporter("guided", 6, "bar") as reporter:
        for batch in range(2):
            for step, _ in enumerate(reporter.track_steps(iter(range(4)), 4)):
                images, steps = reporter._bars.tasks
                assert (steps.completed, steps.total) == (step + 1, 4)
            reporter.advance(3)
            assert (images.completed, images.total, images.description) == (3 * batch + 3, 6, "guided")


def test_a_download_is_a_bar_with_its_size_on_a_terminal(capsys, monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "200"}.items():  # a terminal, to rich
        monkeypatch.setenv(name, value)
    with ProgressReporter("a.pt", unit="bytes") as reporter:
        reporter.update(300_000, 300_000)
    output = capsys.readouterr().err
    assert [part for part in ("a.pt", "300.0/300.0 kB", "━") if part not in output] == []


def test_a_count_that_is_reported_again_is_printed_once(clock, capsys):
    with ProgressReporter("guided", 3, "lines") as reporter:
        for completed in (3, 3, 3):
            reporter.update(completed)
    assert capsys.readouterr().err.splitlines() == ["guided: 3/3 images, 3000000000.00/s"]
