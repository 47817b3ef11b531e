"""Requests of the page: each samples rows of images, and gives its command, Python lines and run folder."""

import hashlib
import shlex
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from sagl.errors import UserError
from sagl.playground.code import python_text
from sagl.playground.controls import SAMPLES, Form, Request, Value
from sagl.playground.download import Download
from sagl.playground.rows import Frame, Row, RowSampler

UNGUIDED, KEPT, GUIDED = "Unguided", "A (kept)", "Guided"
"""Names of rows, from top to bottom."""
MAX_DOWNLOADS = 32
"""Number of the last run folders that can be downloaded."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows of equal seeds."""

    rows: Mapping[str, Row | Frame | None]
    """By name, from top to bottom; None before the first step."""
    requests: Mapping[str, Request]
    """Requests of the rows that have a command of their own."""

    @property
    def is_finished(self) -> bool:
        """True if all rows were sampled."""
        return all(isinstance(row, Row) for row in self.rows.values())

    @property
    def finished_rows(self) -> dict[str, Row]:
        """Rows that were sampled."""
        return {name: row for name, row in self.rows.items() if isinstance(row, Row)}

    def command(self, name: str) -> str:
        """Return the command line of a row."""
        request = self.requests[name]
        compare = ["--compare"] if is_guided(request) else []
        return shlex.join(["sagl", "sample", *request.arguments, *compare])

    def python(self, name: str) -> str:
        """Return the Python lines that make the images of a row."""
        return python_text(self.finished_rows[name].run)


class Playground:
    """One sampler for all sessions, and the run folders that they can download."""

    def __init__(self, form: Form) -> None:
        self.form, self.sampler = form, RowSampler()
        self.downloads: OrderedDict[str, Download] = OrderedDict()

    def compare(
        self, network: str, values: Mapping[str, Value], kept: Mapping[str, Value] | None = None
    ) -> Iterator[Comparison]:
        """Sample with the values of the controls, with kept values at the same seeds, and without guidance.

        Yields:
            The rows after every step; the guided row is sampled first.

        Raises:
            UserError: a value is refused.
        """
        requests = {GUIDED: self.form.request(network, values)}
        if kept is not None:
            same_samples = {name: values[name] for name in SAMPLES}
            requests[KEPT] = self.form.request(network, {**kept, **same_samples})
        configs = {name: request.config for name, request in requests.items()}
        configs[UNGUIDED] = replace(configs[GUIDED], guidances={})
        if not is_guided(requests[GUIDED]):
            requests[UNGUIDED] = requests.pop(GUIDED)
            del configs[GUIDED]
        rows: dict[str, Row | Frame | None] = {name: None for name in (UNGUIDED, KEPT, GUIDED) if name in configs}
        try:
            for name, config in configs.items():
                for rows[name] in self.sampler.sample(config):
                    yield Comparison(rows=dict(rows), requests=requests)
        finally:
            for key in [key for key, download in self.downloads.items() if not download.row.is_kept]:
                del self.downloads[key]

    def offer(self, comparison: Comparison) -> dict[str, str]:
        """Return the keys of the downloads of a finished comparison by row."""
        rows, keys = comparison.finished_rows, {}
        for name, request in comparison.requests.items():
            command = comparison.command(name)
            # the unguided row has the steps of the guided one, which those of the kept row may not be
            has_unguided = is_guided(request) and request.config.sampler == rows[UNGUIDED].run.config.sampler
            unguided = rows[UNGUIDED] if has_unguided else None
            key = keys[name] = hashlib.sha256(f"{rows[name].key} {command}".encode()).hexdigest()[:32]
            self.downloads[key] = Download(config=request.config, command=command, row=rows[name], unguided=unguided)
            self.downloads.move_to_end(key)
        while len(self.downloads) > MAX_DOWNLOADS:
            self.downloads.popitem(last=False)
        return keys

    def message(self, error: UserError) -> str:
        """Return the message that the command line prints."""
        return self.form.command_line.with_flags(" ".join(str(error).split()))


def is_guided(request: Request) -> bool:
    """Return whether a scale is not 0."""
    return any(guidance.scale for guidance in request.config.guidances.values())
