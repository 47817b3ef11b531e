import pytest


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Give each test a cache folder of its own."""
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
