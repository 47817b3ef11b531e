"""Inception score (Salimans et al. 2016): exp of the mean KL divergence of p(class | image) from its mean."""

import torch
from torch import Tensor

CHUNK = 5000
"""Images per chunk in the public evaluators: ten chunks for 50,000 images, two for 10,000."""


def inception_score(logits: Tensor) -> float:
    """Compute the score of all images at once: (N, K) -> a number in [1, K], independent of the images' order."""
    log_p = logits.double().log_softmax(dim=1)
    negative_entropy = (log_p.exp() * log_p).sum() / len(logits)
    mean = log_p.exp().sum(dim=0) / len(logits)
    return float(torch.exp(negative_entropy - torch.special.xlogy(mean, mean).sum()))


def inception_score_in_chunks(logits: Tensor, chunk: int = CHUNK) -> float:
    """Return the mean score of consecutive chunks, as the public evaluators do: (N, K) -> a number in [1, K].

    It depends on the order of the images and is a little smaller. The last chunk may be shorter.
    """
    scores = [inception_score(part) for part in logits.split(chunk)]
    return sum(scores) / len(scores)
