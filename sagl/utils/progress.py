"""How far a run over images is: a bar, with an inner one for the steps of sampling, or plain lines in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES_EVERY_SECONDS = 30.0
"""Without a terminal, one line about so often; the first and the last always."""


class ProgressReporter:
    """Told of every step; see `show_progress`."""

    def steps(self, chain: Iterator[Any], num_steps: int) -> Iterator[Any]:
        """The chain, unchanged."""
        return chain

    def images(self, count: int) -> None:
        """So many images more are done."""


class RichProgress(ProgressReporter):
    """Images, and inside them the steps of the micro-batch in hand."""

    def __init__(self, bars: Progress, title: str, total: int) -> None:
        self.bars = bars
        self.outer = bars.add_task(title, total=total)
        self.inner = bars.add_task("  denoising", total=None, start=False, visible=False)

    def steps(self, chain: Iterator[Any], num_steps: int) -> Iterator[Any]:
        """The chain; every step moves the inner bar."""
        self.bars.reset(self.inner, total=num_steps, visible=True)
        for item in chain:
            self.bars.advance(self.inner)
            yield item

    def images(self, count: int) -> None:
        """Move the outer bar."""
        self.bars.advance(self.outer, count)


class LogProgress(ProgressReporter):
    """A line now and then, for logs."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self.console, self.title, self.total, self.done = console, title, total, 0
        self.started = self.said = time.monotonic()

    def images(self, count: int) -> None:
        """Say how many are done, how fast, and how long it will take."""
        first, now = self.done == 0, time.monotonic()
        self.done += count
        if not first and self.done < self.total and now - self.said < LINES_EVERY_SECONDS:
            return
        self.said, rate = now, self.done / max(now - self.started, 1e-9)
        left = f", {(self.total - self.done) / rate:.0f} s left" if self.done < self.total else ""
        self.console.print(f"{self.title}: {self.done}/{self.total} images, {rate:.2f}/s{left}", highlight=False)


@contextmanager
def show_progress(kind: str, title: str, total: int) -> Iterator[ProgressReporter]:
    """Show the progress of `total` images on the error stream.

    Args:
        kind: bar, lines, off, or auto: a bar on a terminal, lines elsewhere.
        title: what is being done.
        total: images.
    """
    console = Console(stderr=True)
    if kind == "off":
        yield ProgressReporter()
    elif kind == "lines" or (kind == "auto" and not console.is_terminal):
        yield LogProgress(console, title, total)
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            yield RichProgress(bars, title, total)
