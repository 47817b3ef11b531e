"""Progress of a command on stderr: bars on a terminal, lines in a log."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
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
    """Shows how many of `total` images or bytes are done, and how long the rest will take.

    Args:
        title: what is being done.
        total: number of images or bytes; None if it is not known yet.
        kind: how to show it.
        unit: images or bytes.
    """

    def __init__(
        self,
        title: str = "",
        total: int | None = None,
        kind: ProgressKind = "auto",
        unit: Literal["images", "bytes"] = "images",
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.completed = 0
        self.console = Console(stderr=True)
        self.kind = ("bar" if self.console.is_terminal else "lines") if kind == "auto" else kind
        counts = (MofNCompleteColumn(),) if unit == "images" else (DownloadColumn(), TransferSpeedColumn())
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *counts,
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=self.kind != "bar",
        )
        self._task: TaskID | None = None
        self._steps_task: TaskID | None = None
        self._start = time.monotonic()
        self._last_line: float | None = None
        self._completed_before = 0

    def __enter__(self) -> "ProgressReporter":
        self._bars.start()
        if self.total is not None:
            self.update(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def advance(self, count: int = 1) -> None:
        """Report `count` more images or bytes."""
        self.update(self.completed + count)

    def update(self, completed: int, total: int | None = None) -> None:
        """Report the number of images or bytes that are done, and the total once it is known."""
        has_advanced = completed > self.completed
        self.completed, self.total = completed, total or self.total
        if self._task is None:  # what an earlier command has done does not count as speed
            self._completed_before = completed
            self._task = self._bars.add_task(self.title, total=self.total, completed=completed)
        self._bars.update(self._task, completed=completed, total=self.total)
        if self.kind == "lines" and has_advanced:
            self._print_line()

    def track_steps(self, steps: Iterator[T], num_steps: int) -> Iterator[T]:
        """Yield the steps of one batch and show them in a second bar."""
        if self._steps_task is None:
            self._steps_task = self._bars.add_task("  denoising", total=num_steps)
        self._bars.reset(self._steps_task, total=num_steps)
        for step in steps:
            self._bars.advance(self._steps_task)
            yield step

    def _print_line(self) -> None:
        now, is_last = time.monotonic(), self.completed == self.total
        if self._last_line is not None and now - self._last_line < LINE_INTERVAL_SECONDS and not is_last:
            return
        rate = (self.completed - self._completed_before) / max(now - self._start, 1e-9)
        left = f", {(self.total - self.completed) / rate:.0f} s left" if self.total and rate and not is_last else ""
        self._last_line = now
        done = f"{self._format(self.completed)}/{self._format(self.total)}"
        text = f"{done} images, {rate:.2f}/s" if self.unit == "images" else f"{done} MB, {rate / 1e6:.1f} MB/s"
        self.console.print(f"{self.title}: {text}{left}", highlight=False)

    def _format(self, count: int | None) -> str:
        return "?" if count is None else str(count) if self.unit == "images" else f"{count / 1e6:.1f}"
