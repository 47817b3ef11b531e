"""Inception score (Salimans et al. 2016): exp of the mean KL divergence of p(class | image) from its mean."""

import torch
from torch import Tensor

CHUNK = 5000
"""Images of a chunk of the public evaluators: ten for 50,000 images, two for 10,000."""


def sums_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What the score needs of some images: (N, K) -> (K,) sum of probabilities, () of p log p, both float64."""
    log_p = logits.double().log_softmax(dim=1)
    return log_p.exp().sum(dim=0), (log_p.exp() * log_p).sum()


def score_of(probabilities: Tensor, negative_entropy: Tensor, count: int) -> float:
    """The score of all images behind the sums, from 1 to K."""
    mean = probabilities / count
    return float(torch.exp(negative_entropy / count - torch.special.xlogy(mean, mean).sum()))


def inception_score(logits: Tensor) -> float:
    """Over all images at once: (N, K) -> 1 … K. Neither their order nor the number of processes matters."""
    return score_of(*sums_of(logits), len(logits))


def inception_score_in_chunks(logits: Tensor, chunk: int = CHUNK) -> float:
    """The mean over consecutive chunks, as public evaluators have it; depends on the images' order, a little smaller.

    The last chunk holds what is left: (N, K) -> 1 … K.
    """
    scores = [inception_score(part) for part in logits.split(chunk)]
    return sum(scores) / len(scores)
