import numpy as np
import pytest
import torch

from sagl.errors import UserError
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.frechet import frechet_distance, statistics
from sagl.metrics.statistics_file import Reference, has_statistics, read_reference, write_reference

GENERATOR = torch.Generator().manual_seed(0)
FEATURES, SPATIAL, OTHERS = (torch.randn(n, d, generator=GENERATOR) for n, d in ((30, 5), (30, 7), (20, 5)))


def stats(**changes):
    whole = {"pooled": statistics(FEATURES), "spatial": statistics(SPATIAL), "features": FEATURES[::3]}
    return FeatureStatistics(**whole | changes)


def roundtrip(path, **changes):
    write_reference(Reference(statistics=stats(**changes), extractor="tiny", source="images"), path)
    return read_reference(path)


def same(a, b):
    return a.mean.equal(b.mean) and a.covariance.equal(b.covariance) and a.num_samples == b.num_samples


def test_a_written_file_is_read_back(tmp_path):
    result = roundtrip(tmp_path / "deep" / "a.npz")
    assert same(result.statistics.pooled, statistics(FEATURES))
    assert same(result.statistics.spatial, statistics(SPATIAL))
    assert result.statistics.features.equal(FEATURES[::3])
    assert (result.extractor, result.source, result.statistics.num_samples) == ("tiny", "images", 30)
    assert has_statistics(tmp_path / "deep" / "a.npz")


@pytest.mark.parametrize("version", ["", "a1"])
def test_the_version_of_the_extractor_is_read_back(version, tmp_path):
    write_reference(Reference(statistics=stats(), extractor="tiny", extractor_version=version), tmp_path / "a.npz")
    assert read_reference(tmp_path / "a.npz").extractor_version == version


def test_missing_parts_stay_missing(tmp_path):
    result = roundtrip(tmp_path / "a.npz", spatial=None, features=None).statistics
    assert (result.spatial, result.features) == (None, None)


@pytest.mark.parametrize("form", ["openai", "edm"])
def test_published_files_belong_to_inception_and_give_the_distance_of_their_images(form, tmp_path):
    mu, sigma = FEATURES.double().numpy().mean(axis=0), np.cov(FEATURES.double().numpy(), rowvar=False)
    more = {"mu_s": np.zeros(3), "sigma_s": np.eye(3), "arr_0": np.zeros((2, 4, 4, 3), dtype=np.uint8)}
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma, **(more if form == "openai" else {}))
    result = read_reference(tmp_path / "ref.npz")
    assert result.extractor == "inception"
    assert (result.statistics.spatial is not None) == (form == "openai")
    assert (result.statistics.features, result.statistics.num_samples) == (None, 0)
    expected = frechet_distance(statistics(OTHERS), statistics(FEATURES))
    assert frechet_distance(statistics(OTHERS), result.statistics.pooled) == pytest.approx(expected, rel=1e-10)


def test_a_file_of_images_has_no_statistics(tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2, 4, 4, 3), dtype=np.uint8))
    assert not has_statistics(tmp_path / "samples.npz")
    assert not has_statistics(tmp_path)
    assert not has_statistics(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"\(3,\) and float64 \(4, 4\)"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, r"\(3, 1\)"),
        ({"mu": np.zeros(3, dtype=int), "sigma": np.eye(3)}, "int64"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "finite"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.inf)}, "finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2)}, "sigma_s"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros((4, 2))}, r"\(n, 3\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros((4, 3), dtype=int)}, "int64"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "features": np.full((4, 3), np.nan)}, "finite features"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "num_samples": -3}, "num_samples.* -3"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "num_samples": np.array([5, 6])}, "num_samples"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "num_samples": 5.5}, "num_samples"),
        ({"arr_0": np.zeros(3)}, "mu and sigma"),
        ({"mu": np.array([{}]), "sigma": np.eye(3)}, "damaged"),
    ],
)
def test_wrong_arrays_are_refused_by_name(arrays, named, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=named):
        read_reference(tmp_path / "bad.npz")


@pytest.mark.parametrize("length", [0, 10, 300])
def test_a_damaged_file_is_refused(length, tmp_path):
    np.savez(tmp_path / "whole.npz", mu=np.zeros(30), sigma=np.eye(30))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:length])
    with pytest.raises(UserError, match="damaged"):
        has_statistics(tmp_path / "cut.npz")
