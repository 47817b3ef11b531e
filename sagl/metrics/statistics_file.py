"""Statistics files of reference images: sagl's own, and those published by OpenAI and EDM.

All are npz files with `mu` (D,) and `sigma` (D, D) of pooled features. OpenAI's also hold `mu_s`, `sigma_s` of spatial
features and 10,000 images as `arr_0`; sagl's also name and version of the extractor, the number of images and features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch

from sagl.errors import UserError, require
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.frechet import Statistics
from sagl.settings.evaluation import INCEPTION
from sagl.utils.archives import Array, array_names, read_arrays
from sagl.utils.files import atomic_file

Arrays = dict[str, Array]
T = TypeVar("T")
NAMES = (
    *("mu", "sigma", "mu_s", "sigma_s", "features", "num_samples"),
    *("extractor", "extractor_version", "source", "image_size", "digest"),
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Contents of a statistics file."""

    statistics: FeatureStatistics
    extractor: str
    extractor_version: str = ""
    """Text that differs for other weights or code of the extractor, if the file has it; see
    `extractors.extractor_version`."""
    source: str = ""
    """Path or name of the images, if the file has it."""
    image_size: tuple[int, int] | None = None
    """(H, W) of the images before the extractor resized them, if the file has it."""
    crop_size: int | None = None
    """Size that the images were cropped to for this evaluation; None for images as they are. Not written to the
    file."""
    digest: str = ""
    """Digest of the images or of the file, which distinguishes references of one name; empty for images that never
    change."""
    notes: tuple[str, ...] = ()
    """Notes on how the statistics were obtained; not written to the file."""


def has_statistics(path: Path) -> bool:
    """Return whether this is an npz file with statistics.

    Raises:
        UserError: it is a damaged npz file.
    """
    return path.suffix.lower() == ".npz" and path.is_file() and "mu" in _read(array_names, path)


def has_images(path: Path) -> bool:
    """Return whether a statistics file holds images as well.

    Raises:
        UserError: it is damaged.
    """
    return "arr_0" in _read(array_names, path)


def read_extractor(path: Path) -> str:
    """Return the name of the extractor of a statistics file; published ones have none and are Inception's.

    Raises:
        UserError: it is damaged.
    """
    return str(_read(lambda path: read_arrays(path, ["extractor"]), path).get("extractor", INCEPTION))


def read_reference(path: Path) -> Reference:
    """Read a statistics file, sagl's own or a published one, without its images.

    Raises:
        UserError: it is damaged, or an array has the wrong shape or type.
    """
    arrays = {name: np.array(array) for name, array in _read(lambda path: read_arrays(path, NAMES), path).items()}
    num_samples = _num_samples(arrays, path)
    pooled = _statistics(arrays, "", num_samples, path)
    require(pooled is not None, f"`reference` must hold mu and sigma, and {path} does not.")
    assert pooled is not None
    image_size = arrays.get("image_size")
    return Reference(
        statistics=FeatureStatistics(
            pooled=pooled,
            spatial=_statistics(arrays, "_s", num_samples, path),
            features=_features(arrays, len(pooled.mean), path),
        ),
        extractor=str(arrays.get("extractor", INCEPTION)),
        extractor_version=str(arrays.get("extractor_version", "")),
        source=str(arrays.get("source", "")),
        digest=str(arrays.get("digest", "")),
        image_size=None if image_size is None or image_size.shape != (2,) else (int(image_size[0]), int(image_size[1])),
    )


def write_reference(reference: Reference, path: Path, argument: str = "output") -> None:
    """Write a statistics file atomically.

    Raises:
        UserError: it cannot be written; names `argument`.
    """
    statistics = reference.statistics
    arrays: dict[str, Any] = {"extractor": reference.extractor, "source": reference.source}
    arrays["num_samples"] = statistics.num_samples
    for suffix, part in (("", statistics.pooled), ("_s", statistics.spatial)):
        if part is not None:
            arrays |= {f"mu{suffix}": part.mean.numpy(), f"sigma{suffix}": part.covariance.numpy()}
    if statistics.features is not None:
        arrays["features"] = statistics.features.numpy()
    if reference.image_size is not None:
        arrays["image_size"] = reference.image_size
    for name, text in (("digest", reference.digest), ("extractor_version", reference.extractor_version)):
        if text:
            arrays[name] = text
    with atomic_file(path, argument) as partial, partial.open("wb") as file:
        np.savez(file, **{name: np.asarray(value) for name, value in arrays.items()})  # type: ignore[arg-type]


def _num_samples(arrays: Arrays, path: Path) -> int:
    """Return the number of images, or 0 if the file has none, as published ones."""
    array = arrays.get("num_samples", np.array(0))
    require(
        array.shape == () and array.dtype.kind in "iu" and ("num_samples" not in arrays or int(array) >= 2),
        f"`reference` must hold num_samples, a whole number from 2, and that of {path} is {array.tolist()!r:.40}.",
    )
    return int(array)


def _features(arrays: Arrays, width: int, path: Path) -> torch.Tensor | None:
    if "features" not in arrays:
        return None
    array = arrays["features"]
    require(
        array.ndim == 2 and array.shape[1] == width and array.dtype.kind == "f",
        f"`reference` must hold features (n, {width}) as floats, and those of {path} are {array.dtype} {array.shape}.",
    )
    require(bool(np.isfinite(array).all()), f"`reference` must hold finite features, and those of {path} are not.")
    return torch.from_numpy(array.astype(np.float32, copy=False))


def _statistics(arrays: Arrays, suffix: str, num_samples: int, path: Path) -> Statistics | None:
    if f"mu{suffix}" not in arrays:
        return None
    require(f"sigma{suffix}" in arrays, f"`reference` must hold sigma{suffix} beside mu{suffix}, and {path} does not.")
    mean, covariance = arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"]
    require(
        mean.ndim == 1
        and covariance.shape == (len(mean), len(mean))
        and mean.dtype.kind == covariance.dtype.kind == "f",
        f"`reference` must hold mu{suffix} (D,) and sigma{suffix} (D, D) as floats, and those of {path} are "
        f"{mean.dtype} {mean.shape} and {covariance.dtype} {covariance.shape}.",
    )
    require(
        bool(np.isfinite(mean).all() and np.isfinite(covariance).all()),
        f"`reference` must hold finite statistics, and mu{suffix} or sigma{suffix} of {path} are not.",
    )
    require(
        bool(np.abs(covariance - covariance.T).max() <= 1e-6 * np.abs(covariance).max()),
        f"`reference` must hold a covariance, and sigma{suffix} of {path} is not symmetric.",
    )
    return Statistics(
        mean=torch.from_numpy(mean.astype(np.float64)),
        covariance=torch.from_numpy(covariance.astype(np.float64)),
        num_samples=num_samples,
    )


def _read(read: Callable[[Path], T], path: Path) -> T:
    try:
        return read(path)
    except BadZipFile as error:
        raise UserError(f"`reference` must be a whole npz file, and {path} is damaged: {error}.") from error
