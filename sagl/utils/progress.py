"""Progress of a command on stderr: bars on a terminal, lines in a log."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from sagl.settings.sampling import ProgressKind

T = TypeVar("T")
LINE_INTERVAL_SECONDS = 30.0
"""Least time between two lines; the first and the last are always printed."""


class ProgressReporter(AbstractContextManager["ProgressReporter"]):
    """Shows how many of `total` images, or other units, are done, and how long the rest will take.

    Args:
        title: what is being done.
        total: number of units; None if it is not known yet.
        kind: how to show it.
        unit: what is counted.
        completed: number of units that an earlier command has done, which do not count as speed.
    """

    def __init__(
        self,
        title: str = "",
        total: int | None = None,
        kind: ProgressKind = "auto",
        unit: Literal["images", "bytes", "steps", "batches"] = "images",
        completed: int = 0,
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.completed, self.note = completed, ""
        self.console = Console(stderr=True)
        self.kind = ("bar" if self.console.is_terminal else "lines") if kind == "auto" else kind
        counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *counts,
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=self.kind != "bar",
        )
        self._task: TaskID | None = None
        self._part_task: TaskID | None = None
        self._part = ("", 0, 0)
        self._start = time.monotonic()
        self._last_line: float | None = None
        self._completed_before = completed

    def __enter__(self) -> "ProgressReporter":
        self._bars.start()
        if self.total is not None:
            self.update(self.completed)
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def advance(self, count: int = 1) -> None:
        """Report `count` more units."""
        self.update(self.completed + count)

    def update(self, completed: int, total: int | None = None, note: str = "") -> None:
        """Report the number of units that are done, the total once it is known, and a text to show after them."""
        has_advanced = completed > self.completed
        self.completed, self.total, self.note = completed, total or self.total, note
        if self._task is None:  # what an earlier command has done does not count as speed
            self._completed_before = completed
            self._task = self._bars.add_task(self.title, total=self.total, completed=completed, note=note)
        self._bars.update(self._task, completed=completed, total=self.total, note=note)
        if self.kind == "lines" and has_advanced:
            self._print_line()

    def update_part(self, title: str, completed: int, total: int) -> None:
        """Report the progress within the present unit, in a second bar; a smaller or equal number begins a new part."""
        if self._part_task is None:
            self._part_task = self._bars.add_task("", note="")
        if (title, total) != self._part[::2] or completed <= self._part[1]:  # the speed of another part does not count
            self._bars.reset(self._part_task, description=f"  {title}", total=total, visible=True)
        self._bars.update(self._part_task, completed=completed)
        self._part = (title, completed, total)

    def hide_part(self) -> None:
        """Remove the second bar until the next part."""
        if self._part_task is not None:
            self._bars.update(self._part_task, visible=False)
            self._part = ("", 0, 0)

    def track_steps(self, steps: Iterator[T], num_steps: int) -> Iterator[T]:
        """Yield the denoising steps of one batch and show them in a second bar."""
        for number, step in enumerate(steps, start=1):
            self.update_part("denoising", number, num_steps)
            yield step

    def print(self, text: str) -> None:
        """Print a line above the bars, or between the lines."""
        if self.kind != "off":
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _print_line(self) -> None:
        now, is_last = time.monotonic(), self.completed == self.total
        if self._last_line is not None and now - self._last_line < LINE_INTERVAL_SECONDS and not is_last:
            return
        rate = (self.completed - self._completed_before) / max(now - self._start, 1e-9)
        left, note = "", f", {self.note}" if self.note else ""
        if self.total and rate and not is_last:
            left = f", {timedelta(seconds=round((self.total - self.completed) / rate))} left"
        self._last_line = now
        done = f"{self._format(self.completed)}/{self._format(self.total)}"
        text = f"{done} MB, {rate / 1e6:.1f} MB/s" if self.unit == "bytes" else f"{done} {self.unit}, {rate:.2f}/s"
        self.print(f"{self.title}: {text}{left}{note}")

    def _format(self, count: int | None) -> str:
        return "?" if count is None else f"{count / 1e6:.1f}" if self.unit == "bytes" else str(count)
