import numpy as np
import pytest
import torch

from sagl.metrics.distance import InceptionScore
from sagl.metrics.inception_score import inception_score, inception_score_in_chunks


def drawn(count, classes=7, seed=0):
    return 2 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def written_out(logits):
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=1, keepdims=True)
    return float(np.exp(np.mean([np.sum(row * np.log(row / p.mean(axis=0))) for row in p])))


def test_the_score_is_the_definition_written_out():
    assert inception_score(drawn(50)) == pytest.approx(written_out(drawn(50)), rel=1e-12)


def test_chunks_are_consecutive_and_their_scores_are_averaged():
    logits = drawn(50)
    assert inception_score_in_chunks(logits, 20) == pytest.approx(
        (written_out(logits[:20]) + written_out(logits[20:40]) + written_out(logits[40:])) / 3, rel=1e-12
    )


def test_order_matters_to_chunks_alone():
    logits = drawn(50).sort(dim=0).values
    mixed = logits[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    assert inception_score(mixed) == pytest.approx(inception_score(logits), rel=1e-12)
    assert inception_score_in_chunks(mixed, 10) != pytest.approx(inception_score_in_chunks(logits, 10), rel=1e-3)


def test_it_is_1_where_all_images_are_alike_and_k_where_each_class_is_sure():
    assert inception_score(drawn(1).expand(9, -1)) == pytest.approx(1)
    assert inception_score(100 * torch.eye(7)) == pytest.approx(7)


def test_the_metric_of_the_callbacks_prints_the_same_number():
    metric = InceptionScore(7)
    for part in drawn(50).split(13):
        metric.update(part)
    assert float(metric.compute()) == pytest.approx(inception_score(drawn(50)), rel=1e-12)
