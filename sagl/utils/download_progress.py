"""How far a download has come, shown on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]
"""Told bytes so far and in all; 0 in all where the server does not say."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Shows bytes on stderr: a bar with rate and time left on a terminal, elsewhere a line every tenth."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title)
        return
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console) as bar:
        tasks: list[rich.TaskID] = []

        def on_progress(done: int, total: int) -> None:
            if not tasks:  # begun here, so that bytes of an earlier run do not count as speed
                tasks.append(bar.add_task(title, total=total or None, completed=done))
            bar.update(tasks[0], completed=done, total=total or None)

        yield on_progress


def _lines(title: str) -> Progress:
    """A line for each tenth of the whole, or each 256 MiB of an unknown one, that was not reached before."""
    reached = -1

    def on_progress(done: int, total: int) -> None:
        nonlocal reached
        part = done * 10 // total if total else done >> 28
        if part > reached:
            reached = part
            share = f"{done * 100 // total} % of {total / 1e6:.1f} MB" if total else f"{done / 1e6:.1f} MB"
            print(f"{title}: {share}", file=sys.stderr, flush=True)

    return on_progress
