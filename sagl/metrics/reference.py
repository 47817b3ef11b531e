"""Statistics of reference images, computed once and kept."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sagl.metrics.frechet import Statistics, statistics


def cached_statistics(path: Path, features: Callable[[], Tensor]) -> Statistics:
    """Statistics from `path`, or of the features, which are then computed and kept there."""
    if not path.exists():
        write_statistics(statistics(features()), path)
    return read_statistics(path)


def write_statistics(s: Statistics, path: Path) -> None:
    """Write mu, sigma and the number of samples, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, mu=s.mean.numpy(), sigma=s.covariance.numpy(), num_samples=s.num_samples)
    os.replace(partial, path)


def read_statistics(path: Path) -> Statistics:
    """What `write_statistics` wrote."""
    with np.load(path) as arrays:
        mean, covariance = torch.from_numpy(arrays["mu"]), torch.from_numpy(arrays["sigma"])
        return Statistics(mean=mean, covariance=covariance, num_samples=int(arrays["num_samples"]))
