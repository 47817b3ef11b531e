import numpy as np
import pytest
import torch

from sagl.metrics.frechet import frechet_distance, statistics
from sagl.metrics.reference import cached_statistics, read_statistics, write_statistics

FEATURES = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))


def equal(a, b):
    return torch.equal(a.mean, b.mean) and torch.equal(a.covariance, b.covariance) and a.num_samples == b.num_samples


def test_statistics_come_back_bit_for_bit(tmp_path):
    s = statistics(FEATURES)
    write_statistics(s, tmp_path / "deep" / "a.npz")
    found = read_statistics(tmp_path / "deep" / "a.npz")
    assert equal(found, s)
    assert frechet_distance(found, s) == pytest.approx(0, abs=1e-9)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.npz"]


def test_a_file_has_the_names_that_public_tools_use(tmp_path):
    write_statistics(statistics(FEATURES), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_allclose(arrays["mu"], FEATURES.double().mean(0))
        np.testing.assert_allclose(arrays["sigma"], np.cov(FEATURES.double().numpy().T))


def test_features_are_computed_once_and_kept(tmp_path):
    calls = []

    def features():
        calls.append(1)
        return FEATURES

    first = cached_statistics(tmp_path / "a.npz", features)
    second = cached_statistics(tmp_path / "a.npz", features)
    assert calls == [1]
    assert equal(first, second)
    assert equal(first, statistics(FEATURES))


def test_what_fails_on_the_way_leaves_nothing_that_would_be_read(tmp_path, monkeypatch):
    def full_disk(file, **_):
        file.write(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sagl.metrics.reference.np.savez", full_disk)
        with pytest.raises(OSError, match="no space"):
            cached_statistics(tmp_path / "a.npz", lambda: FEATURES)
    assert not (tmp_path / "a.npz").exists()
    assert equal(cached_statistics(tmp_path / "a.npz", lambda: FEATURES), statistics(FEATURES))
