import base64
import re
from html.parser import HTMLParser

import pytest

from sagl.evaluation.html import html_page
from sagl.evaluation.report import MARK, Cell, Gallery, Row, Section, Sheet, Table
from tests.helpers.sampled import picture

VOID = {"meta", "col", "img"}
NASTY = "</th><script>alert(1)</script> & \"quoted\" 'x'"


class Page(HTMLParser):
    """Elements and text of a page; every tag that is opened must be closed, in turn."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += [data.strip()] if data.strip() and self.open[-1] != "style" else []

    def all(self, tag):
        return [attributes for found, attributes in self.elements if found == tag]


def sheet(word="plain", *, ids=range(3), side=8, names=("a", "b")):
    """Every part of a page, with this word in each."""
    cell = Cell(text=word, note=word, best=True)
    section = Section(title=word, note=word, rows=(Row(name=Cell(text=word, note=word), cells=(cell, Cell(text="–"))),))
    tables = (Table(title=word, heads=(word, word), sections=(section,), note=word),)
    rows = tuple(tuple(picture(100 * k + i, side) for i in ids) for k in range(len(names)))
    gallery = Gallery(names=names, ids=tuple(ids), rows=rows, side=side) if ids else None
    return Sheet(title=word, lines=(word,), tables=tables, alike=word, gallery=gallery)


def test_the_page_is_whole_html_that_says_near_its_beginning_who_made_it():
    source = html_page(sheet())
    assert Page(source).open == []
    assert source.startswith("<!doctype html>")
    assert MARK in source[:200]
    assert ("html", {"lang": "en"}) in Page(source).elements
    assert {"charset": "utf-8"} in Page(source).all("meta")


def test_the_same_sheet_gives_the_same_page():
    assert html_page(sheet()) == html_page(sheet())


def test_text_is_text_wherever_it_stands():
    page = Page(html_page(sheet(NASTY, names=(NASTY, "b"))))
    assert page.all("script") == []
    assert (
        page.text.count(NASTY) == 15
    )  # the page's title twice, a line, a run beside its images, 10 in the table, 1 below
    assert page.all("img")[0]["alt"] == f"{NASTY}, image 0"
    assert page.open == []


def test_the_page_needs_nothing_from_elsewhere():
    source = html_page(sheet())
    assert not re.search(r"https?:|//|url\(|@import|<link|<iframe", re.sub(r"base64,[\w+/=]+", "", source))
    for tag, attributes in Page(source).elements:
        assert tag != "script"
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")


def test_there_are_styles_for_dark_screens_and_for_paper():
    source = html_page(sheet())
    assert "@media (prefers-color-scheme: dark)" in source
    assert "@media print" in source
    assert "color-scheme: light dark" in source


def test_the_images_are_those_of_the_runs_byte_for_byte_a_row_a_run():
    made = sheet()
    images = Page(html_page(made)).all("img")
    assert [image["alt"] for image in images] == [f"{name}, image {i}" for name in "ab" for i in range(3)]
    found = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images]
    assert found == [picture for row in made.gallery.rows for picture in row]


@pytest.mark.parametrize(("side", "kind", "width"), [(8, "grid small", "16px"), (80, "grid", "80px")])
def test_small_images_are_shown_twice_as_large_and_with_sharp_pixels(side, kind, width):
    (grid,) = [div for div in Page(html_page(sheet(side=side))).all("div") if "grid" in div["class"]]
    assert grid["class"] == kind
    assert f"--width: {width}" in grid["style"]
    assert "--columns: 3" in grid["style"]


def test_many_images_stand_in_blocks_each_with_its_ids_and_names():
    page = Page(html_page(sheet(ids=range(20))))
    grids = [div for div in page.all("div") if "grid" in div["class"]]
    assert [re.search(r"--columns: (\d+)", grid["style"])[1] for grid in grids] == ["16", "4"]
    assert [page.text.count(name) for name in "ab"] == [2, 2]
    assert page.text.index("15") < page.text.index("16")


def test_the_best_number_of_a_row_is_marked_by_a_word_and_others_are_not():
    page = Page(html_page(sheet()))
    assert page.text.count("best") == 1
    assert [attributes for attributes in page.all("span") if attributes.get("class") == "best"] == [{"class": "best"}]


def test_a_page_without_images_or_shared_settings_has_no_room_for_them():
    found = html_page(Sheet(title="a", lines=(), tables=sheet().tables, alike=""))
    assert "Images at equal ids" not in found
    assert "The same in all runs" not in found
