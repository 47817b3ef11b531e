import numpy as np
import pytest
import torch

from sagl.metrics.inception_score import inception_score, inception_score_in_chunks


def random_logits(count, classes=7, seed=0):
    return 2 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def by_definition(logits):
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=1, keepdims=True)
    return float(np.exp(np.mean([np.sum(row * np.log(row / p.mean(axis=0))) for row in p])))


def test_the_score_equals_its_definition():
    assert inception_score(random_logits(50)) == pytest.approx(by_definition(random_logits(50)), rel=1e-12)


def test_chunks_are_consecutive_and_their_scores_are_averaged():
    logits = random_logits(50)
    assert inception_score_in_chunks(logits, 20) == pytest.approx(
        (by_definition(logits[:20]) + by_definition(logits[20:40]) + by_definition(logits[40:])) / 3, rel=1e-12
    )


def test_the_order_of_images_matters_only_for_chunks():
    logits = random_logits(50).sort(dim=0).values
    mixed = logits[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    assert inception_score(mixed) == pytest.approx(inception_score(logits), rel=1e-12)
    assert inception_score_in_chunks(mixed, 10) != pytest.approx(inception_score_in_chunks(logits, 10), rel=1e-3)


def test_the_score_is_1_for_equal_images_and_k_for_certain_and_balanced_classes():
    assert inception_score(random_logits(1).expand(9, -1)) == pytest.approx(1)
    assert inception_score(100 * torch.eye(7)) == pytest.approx(7)
