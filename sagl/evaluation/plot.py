"""A plot of lines for the HTML page of a report, drawn as SVG by its template."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 720, 360, 64, 44, 14
"""Size of a plot in pixels, and the space for the labels of its axes."""
NUM_TICKS = 6
"""Approximate number of ticks of the vertical axis."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """Connected points."""

    name: str
    points: Sequence[Point]
    best: bool = False
    """True for a line that is emphasised."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Lines in a coordinate system; what is above or below the vertical range is drawn at its end."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    x_ticks: Sequence[float]
    y_range: tuple[float, float]
    logarithmic: bool = False
    """True for a logarithmic horizontal axis."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return WIDTH, HEIGHT

    @property
    def y_ticks(self) -> list[float]:
        """Round numbers in the vertical range."""
        low, high = self.y_range
        step = 10 ** math.floor(math.log10((high - low) / NUM_TICKS))
        step *= next(factor for factor in (1, 2, 5, 10) if factor * step * NUM_TICKS >= high - low)
        return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]

    def x(self, value: float) -> float:
        """Return the horizontal position of a value in pixels."""
        first, last, here = (math.log(v) if self.logarithmic else v for v in (self.x_ticks[0], self.x_ticks[-1], value))
        fraction = 0.5 if first == last else (here - first) / (last - first)
        return round(LEFT + (WIDTH - LEFT - MARGIN) * fraction, 1)

    def y(self, value: float) -> float:
        """Return the vertical position of a value in pixels."""
        low, high = self.y_range
        fraction = (high - min(max(value, low), high)) / (high - low)
        return round(MARGIN + (HEIGHT - BOTTOM - MARGIN) * fraction, 1)

    def path(self, line: Line) -> str:
        """Return the positions of a line's points for SVG."""
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y in line.points)
