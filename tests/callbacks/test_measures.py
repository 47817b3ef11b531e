import pytest
import torch

from sagl.callbacks.measures import PreviewMetrics
from sagl.metrics.extractors import EXTRACTORS
from sagl.metrics.features import Features
from sagl.metrics.frechet import frechet_distance, statistics
from sagl.metrics.inception_score import inception_score

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)
REAL, MADE = (torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=GENERATOR) for n in (20, 12))


class Extractor:
    """Six features that need no network, and three classes."""

    seen = 0

    def __init__(self, device):
        pass

    def __call__(self, images):
        Extractor.seen += len(images)
        features = images.float().flatten(1)[:, :6]
        return Features(features, logits=features[:, :3] / 50)


@pytest.fixture(autouse=True)
def extractors(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path))
    monkeypatch.setitem(EXTRACTORS, "plain", lambda device: lambda images: images.float().flatten(1)[:, :6])
    monkeypatch.setitem(EXTRACTORS, "classes", Extractor)


def measured(name, real=REAL, made=MADE):
    measures = PreviewMetrics(name, CPU)
    measures.update_real(real.split(8))
    return measures.compute(made.split(5))


def test_the_distance_is_that_of_all_images_together():
    extract = EXTRACTORS["plain"](CPU)
    want = frechet_distance(statistics(extract(REAL)), statistics(extract(MADE)))
    assert measured("plain") == {"frechet": pytest.approx(want, rel=1e-9)}


def test_an_extractor_with_classes_also_gives_the_inception_score():
    found = measured("classes")
    assert found["inception_score"] == pytest.approx(inception_score(Extractor(CPU)(MADE).logits), rel=1e-9)
    assert found["frechet"] == pytest.approx(measured("plain")["frechet"], rel=1e-9)


def test_real_images_are_looked_at_once_for_all_runs_and_others_again():
    measured("classes")
    Extractor.seen = 0
    again = measured("classes")
    assert Extractor.seen == len(MADE) + 1  # one real image, for the number of classes
    Extractor.seen = 0
    assert measured("classes", real=REAL.flip(0)[1:]) != again
    assert Extractor.seen == len(MADE) + len(REAL) - 1 + 1


def test_numbers_begin_anew_each_time():
    measures = PreviewMetrics("classes", CPU)
    measures.update_real([REAL])
    first = measures.compute([MADE])
    measures.compute([MADE[:4] // 2])
    measures.update_real([REAL[:3]])  # known already
    assert measures.compute([MADE]) == pytest.approx(first, rel=1e-12)
