import pytest

from sagl.evaluation.report import Gallery, clean, enumerated


@pytest.mark.parametrize(("names", "want"), [(["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")])
def test_names_are_enumerated(names, want):
    assert enumerated(names) == want


def test_clean_text_is_one_printable_line_and_keeps_the_letters_of_all_languages():
    assert clean("é 漢 Ω") == "é 漢 Ω"
    assert clean("a\tb\r\n\x1b[2J\u2028\u200b\udc80") == "a\\tb\\r\\n\\x1b[2J\\u2028\\u200b\\udc80"


@pytest.mark.parametrize(("side", "want"), [(32, [16, 16, 8]), (64, [16, 16, 8]), (65, [8] * 5), (256, [8] * 5)])
def test_a_block_is_as_wide_as_a_row_of_a_runs_grid(side, want):
    gallery = Gallery(names=("a",), ids=tuple(range(40)), rows=((b"",) * 40,), side=side)
    assert [len(places) for places in gallery.blocks] == want
    assert [k for places in gallery.blocks for k in places] == list(range(40))
