import re
import sys

import pytest

from sagl.evaluation.report import MARK, Cell, Gallery, Row, Section, Sheet, Table
from sagl.evaluation.text import escaped, legend, markdown, show

NASTY = "<b>x</b> | [y](z) `w` *v* _u_ # & $m$ ~t~ \\"


def sheet(word="plain", *, gallery=None, aligned=False):
    """Every part of a page, with this word in each."""
    cells = (Cell(text=word, note=word, best=True), Cell(text="–"))
    section = Section(title=word, note=word, rows=(Row(name=Cell(text=word, note=word), cells=cells),))
    tables = (Table(title=word, heads=(word, word), sections=(section,), note=word, aligned=aligned),)
    return Sheet(title=word, lines=(word,), tables=tables, alike=word, gallery=gallery)


def gallery(count=3, names=("a", "b")):
    return Gallery(names=names, ids=tuple(range(count)), rows=((b"",) * count,) * len(names), side=8)


# ----------------------------------------------------------------------------------------------------- Markdown


def test_markdown_says_in_its_first_line_who_made_it():
    assert markdown(sheet(), "x.png").startswith(f"<!-- {MARK} -->\n# plain\n")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("output.5", "output.5"),
        ("a|b", "a\\|b"),
        ("*a* _b_", "\\*a\\* \\_b\\_"),
        ("<b>", "\\<b\\>"),
        ("[a](b)", "\\[a\\](b)"),
        ("`a`", "\\`a\\`"),
        ("a & &lt;", "a &amp; &amp;lt;"),
        ("1. first", "1\\. first"),
        ("- dash", "\\- dash"),
        ("+ plus", "\\+ plus"),
        ("---", "\\---"),
        ("0.5", "0.5"),
        ("-0.5", "-0.5"),
        ("12", "12"),
        ("see https://a.b", "see https<!-- -->://a.b"),
        ("www.a.b", "www<!-- -->.a.b"),
    ],
)
def test_text_is_escaped(text, want):
    assert escaped(text) == want


def test_every_table_has_the_same_number_of_cells_in_all_its_lines_whatever_stands_in_them():
    lines = [line for line in markdown(sheet(NASTY), "x.png").splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [4, 4, 4]


def test_no_text_of_a_run_stands_unescaped():
    rest = markdown(sheet(NASTY), "x.png").replace(escaped(NASTY), "")
    assert not re.search(r"<b>|\[y\]|`w`|_u_", rest)
    assert markdown(sheet(NASTY), "x.png").count(escaped(NASTY)) == 13


def test_the_best_number_is_bold():
    assert "| plain (plain) | **plain** (plain) | – |" in markdown(sheet(), "x.png")


def test_numbers_that_are_read_downwards_are_aligned_to_the_right():
    assert "| --- | --: | --: |" in markdown(sheet(aligned=True), "x.png")
    assert "| --- | --- | --- |" in markdown(sheet(), "x.png")


def test_the_picture_is_named_with_what_its_rows_and_columns_are():
    found = markdown(sheet(gallery=gallery()), "my page (2).png")
    said = "Rows from above: a and b. Columns: images 0, 1, 2."
    assert f"![{said}](my%20page%20%282%29.png)\n\n{said}" in found
    assert "![" not in markdown(sheet(), "x.png")


def test_the_legend_says_where_the_picture_has_blocks_and_where_there_is_one_run():
    assert legend(gallery(17)).startswith("Rows of each block from above: a and b. ")
    assert legend(gallery(2, ("a",))) == "a. Columns: images 0, 1."


# ----------------------------------------------------------------------------------------------------- terminal


def test_the_terminal_shows_all_that_a_page_does_with_a_star_at_the_best(capsys):
    show(sheet("word", gallery=gallery()))
    out = capsys.readouterr().out
    assert out.count("word") == 12
    assert "word *" in out
    assert "* the best of its row" in out
    assert "The same in all runs: word" in out


def test_without_a_best_number_there_is_no_legend_of_it(capsys):
    show(Sheet(title="a", lines=(), tables=(), alike=""))
    assert capsys.readouterr().out == ""


def test_text_that_looks_like_markup_is_shown_as_it_is(capsys):
    show(sheet("[bold]x[/bold] [/]"))
    assert capsys.readouterr().out.count("[bold]x[/bold] [/]") == 12


def test_a_narrow_terminal_folds_and_loses_no_word(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    show(sheet("abcdefghij" * 3))
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines[:-1])) <= 40
    assert "".join(lines).count("j") == 3 * 12
