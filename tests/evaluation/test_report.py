import base64
import re
import sys
from html.parser import HTMLParser

import pytest

from sagl.evaluation.report import (
    GENERATOR_TAG,
    TAG_BYTES,
    Cell,
    ImageGrid,
    Report,
    Row,
    Section,
    Table,
    has_generator_tag,
    join_with_and,
    print_report,
    printable,
    render_html,
)
from tests.helpers.run_folders import random_png

VOID = {"meta", "col", "img"}
MARKUP = "</th><script>alert(1)</script> & \"quoted\" 'x' [bold]"


class Page(HTMLParser):
    """Elements and text of a page; every tag that is opened must be closed, in turn."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += [data.strip()] if data.strip() and self.open[-1] != "style" else []

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def grids(self):
        return [div for div in self.all("div") if "grid" in div["class"]]


def report(word="plain", *, ids=range(3), size=8, names=("a", "b")):
    """A report with this word in every part."""
    cells = (Cell(text=word, note=word, best=True), Cell(text="–"))
    section = Section(title=word, note=word, rows=(Row(name=Cell(text=word, note=word), cells=cells),))
    tables = (Table(title=word, columns=(word, word), sections=(section,), note=word),)
    rows = {name: tuple(random_png(100 * k + i, size) for i in ids) for k, name in enumerate(names)}
    images = ImageGrid(ids=tuple(ids), rows=rows, image_size=size) if ids else None
    return Report(title=word, notes=(word,), tables=tables, shared_settings=word, images=images)


@pytest.mark.parametrize(
    ("names", "expected"), [(["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_names_are_joined(names, expected):
    assert join_with_and(names) == expected


def test_printable_text_is_one_line_and_keeps_the_letters_of_all_languages():
    assert printable("é 漢 Ω") == "é 漢 Ω"
    assert printable("a\tb\r\n\x1b[2J\u2028\u200b\udc80") == "a\\tb\\r\\n\\x1b[2J\\u2028\\u200b\\udc80"


# ---------------------------------------------------------------------------------------------------- HTML


def test_the_page_is_valid_and_is_recognised_by_its_tag(tmp_path):
    source = render_html(report())
    assert source.startswith("<!doctype html>")
    assert GENERATOR_TAG in source[:TAG_BYTES]
    assert source == render_html(report())
    assert ("html", {"lang": "en"}) in Page(source).elements
    assert {"charset": "utf-8"} in Page(source).all("meta")
    (tmp_path / "page.html").write_text(source)
    assert has_generator_tag(tmp_path / "page.html")
    assert not has_generator_tag(tmp_path / "absent.html")


def test_markup_in_names_and_values_is_shown_as_text():
    page = Page(render_html(report(MARKUP, names=(MARKUP, "b"))))
    assert page.all("script") == []
    # the title twice, a warning, a run beside its images, 10 in the table, the shared settings
    assert page.text.count(MARKUP) == 15
    assert page.all("img")[0]["alt"] == f"{MARKUP}, image 0"


def test_the_page_has_no_script_and_no_external_address():
    source = render_html(report())
    assert not re.search(r"https?:|//|url\(|@import|<link|<iframe", re.sub(r"base64,[\w+/=]+", "", source))
    for tag, attributes in Page(source).elements:
        assert tag != "script"
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")


def test_the_images_are_those_of_the_runs_byte_for_byte():
    source = report()
    images = Page(render_html(source)).all("img")
    assert [image["alt"] for image in images] == [f"{name}, image {i}" for name in "ab" for i in range(3)]
    files = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images]
    assert files == [file for row in source.images.rows.values() for file in row]


@pytest.mark.parametrize(("size", "css_class", "width"), [(8, "grid small", "16px"), (80, "grid", "80px")])
def test_small_images_are_enlarged(size, css_class, width):
    (grid,) = Page(render_html(report(size=size))).grids
    assert grid["class"] == css_class
    assert f"--width: {width}" in grid["style"]
    assert "--columns: 3" in grid["style"]


@pytest.mark.parametrize(("size", "expected"), [(32, [16, 16, 8]), (64, [16, 16, 8]), (65, [8] * 5), (256, [8] * 5)])
def test_many_images_are_shown_in_blocks(size, expected):
    images = ImageGrid(ids=tuple(range(40)), rows={"a": (b"",) * 40}, image_size=size)
    assert [len(block) for block in images.blocks] == expected
    assert [k for block in images.blocks for k in block] == list(range(40))


def test_every_block_has_its_ids_and_the_names_of_the_runs():
    page = Page(render_html(report(ids=range(20))))
    assert [re.search(r"--columns: (\d+)", grid["style"])[1] for grid in page.grids] == ["16", "4"]
    assert [page.text.count(name) for name in "ab"] == [2, 2]
    assert page.text.index("15") < page.text.index("16")


def test_only_the_best_value_is_marked():
    page = Page(render_html(report()))
    assert page.text.count("best") == 1
    assert [attributes for attributes in page.all("span") if attributes.get("class") == "best"] == [{"class": "best"}]


def test_a_page_without_images_and_shared_settings_has_no_headings_for_them():
    source = render_html(Report(title="a", notes=(), tables=report().tables))
    assert Page(source).all("h2") == [{}]
    assert "<img" not in source


# ------------------------------------------------------------------------------------------------ terminal


@pytest.mark.parametrize("word", ["word", "[bold]x[/bold] [/]"])
def test_the_terminal_shows_all_texts_as_they_are_with_a_star_at_the_best(word, capsys):
    print_report(report(word))
    output = capsys.readouterr().out
    assert output.count(word) == 12
    assert f"{word} *" in output


def test_a_narrow_terminal_folds_and_loses_no_text(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    print_report(report("abcdefghij" * 3))
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines[:-1])) <= 40
    assert "".join(lines).count("j") == 3 * 12
