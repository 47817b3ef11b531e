from pathlib import Path

from sagl.settings.paths import cache_folder


def test_the_cache_is_where_the_user_says_then_the_system_then_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SAGL_CACHE", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "system"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SAGL_CACHE")
    assert cache_folder() == tmp_path / "system" / "sagl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path(tmp_path, ".cache", "sagl")
