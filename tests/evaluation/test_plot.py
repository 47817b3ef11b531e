import re

import pytest

from sagl.evaluation.plot import BOTTOM, HEIGHT, LEFT, MARGIN, WIDTH, Line, Plot
from sagl.evaluation.report import Report, render_html


def plot(**changes):
    lines = (Line(name="a", points=[(100, 0), (200, -3)], best=True), Line(name="b & c", points=[(100, 99)]))
    settings = {"title": "t", "x_label": "x", "y_label": "y", "lines": lines, "x_ticks": [100, 200, 400]}
    return Plot(**{**settings, "y_range": (-4, 6), "logarithmic": True} | changes)


def test_points_lie_between_the_ends_of_the_axes_and_outliers_at_an_end():
    assert [plot().x(value) for value in (100, 200, 400)] == [LEFT, (LEFT + WIDTH - MARGIN) / 2, WIDTH - MARGIN]
    assert [plot().y(value) for value in (6, 99, -4, -99)] == [MARGIN, MARGIN, HEIGHT - BOTTOM, HEIGHT - BOTTOM]
    assert plot(logarithmic=False).x(250) == (LEFT + WIDTH - MARGIN) / 2


@pytest.mark.parametrize(
    ("y_range", "ticks"), [((-4, 6), [-4, -2, 0, 2, 4, 6]), ((0.1, 0.29), [0.1, 0.15, 0.2, 0.25]), ((-1e3, 10), None)]
)
def test_ticks_are_round_numbers_in_the_range(y_range, ticks):
    result = plot(y_range=y_range).y_ticks
    assert 3 <= len(result) <= 8
    assert ticks is None or result == pytest.approx(ticks)


def test_a_page_has_a_line_and_its_points_for_each_line():
    page = render_html(Report(title="t", notes=(), tables=(), plot=plot(), command="tune"))
    assert [len(points.split()) for points in re.findall(r'<polyline points="(.*?)"', page)] == [2, 1]
    assert page.count("<circle") == 3
    assert "<title>b &amp; c</title>" in page
    assert "made by sagl tune" in page
