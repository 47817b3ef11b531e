import pytest

from sagl.utils.download_progress import progress_bar


@pytest.mark.parametrize("total", [1000, 0])
def test_off_a_terminal_progress_is_a_few_lines(total, capsys):
    with progress_bar("a.pt") as on_progress:
        for done in range(1001):
            on_progress(done << 20, total << 20)
    lines = capsys.readouterr().err.splitlines()
    assert 4 <= len(lines) <= 11
    assert all(line.startswith("a.pt: ") for line in lines)
    assert lines == sorted(set(lines), key=lines.index)
    assert ("100 % of 1048.6 MB" in lines[-1]) == bool(total)


def test_on_a_terminal_progress_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with progress_bar("a.pt") as on_progress:
        on_progress(100_000, 300_000)
        on_progress(300_000, 300_000)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [part for part in ("a.pt", "300.0/300.0 kB", "━") if part not in shown.err] == []
