"""Files of statistics to measure from: our own, and those that OpenAI and EDM publish.

All are npz files with `mu` (D,) and `sigma` (D, D) of pooled features. OpenAI's also hold `mu_s`, `sigma_s` of the
spatial ones and 10,000 images as `arr_0`; ours also the extractor's name, its number of images, and features kept.
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sagl.errors import UserError, require
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.frechet import Statistics
from sagl.settings.evaluation import INCEPTION
from sagl.utils.files import atomic_file

Arrays = dict[str, "np.ndarray[Any, np.dtype[Any]]"]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A statistics file."""

    looked: FeatureStatistics
    extractor: str
    source: str = ""
    """What it was made from, where the file says so."""
    side: tuple[int, int] | None = None
    """(H, W) of the images that the extractor was given, where the file says so."""


def holds_statistics(path: Path) -> bool:
    """Whether this is an npz file with statistics.

    Raises:
        UserError: it is a damaged npz file.
    """
    if path.suffix != ".npz" or not path.is_file():
        return False
    return "mu" in _open(path, lambda arrays: arrays.files)


def holds_images(path: Path) -> bool:
    """Whether a statistics file has images too.

    Raises:
        UserError: it is damaged.
    """
    return "arr_0" in _open(path, lambda arrays: arrays.files)


def read_reference(path: Path) -> Reference:
    """A statistics file, ours or a published one; images in it are left alone.

    Raises:
        UserError: it is damaged, or its arrays are not of the right shape or kind.
    """
    names = ("mu", "sigma", "mu_s", "sigma_s", "features", "num_samples", "extractor", "source", "side")
    arrays: Arrays = _open(path, lambda found: {name: found[name] for name in names if name in found.files})
    count = _count(arrays, path)
    pooled, spatial = _statistics(arrays, "", count, path), _statistics(arrays, "_s", count, path)
    require(pooled is not None, f"`reference` must hold mu and sigma, and {path} does not.")
    assert pooled is not None
    side = arrays.get("side")
    return Reference(
        looked=FeatureStatistics(pooled=pooled, spatial=spatial, features=_features(arrays, len(pooled.mean), path)),
        extractor=str(arrays.get("extractor", INCEPTION)),
        source=str(arrays.get("source", "")),
        side=None if side is None or side.shape != (2,) else (int(side[0]), int(side[1])),
    )


def extractor_of_file(path: Path) -> str:
    """The extractor that a statistics file was made with; published ones do not say, and are of Inception.

    Raises:
        UserError: it is damaged.
    """
    return str(_open(path, lambda arrays: arrays["extractor"] if "extractor" in arrays.files else INCEPTION))


def write_reference(reference: Reference, path: Path, argument: str = "output") -> None:
    """Our own form, whole or not at all.

    Args:
        reference: the statistics.
        path: of the file.
        argument: what is called wrong where it cannot be written.

    Raises:
        UserError: it cannot be written.
    """
    looked = reference.looked
    arrays: Arrays = {}
    for end, part in (("", looked.pooled), ("_s", looked.spatial)):
        if part is not None:
            arrays |= {f"mu{end}": part.mean.numpy(), f"sigma{end}": part.covariance.numpy()}
    if looked.features is not None:
        arrays["features"] = looked.features.numpy()
    words: dict[str, Any] = {
        "extractor": reference.extractor,
        "source": reference.source,
        "num_samples": looked.num_samples,
    }
    if reference.side is not None:
        words["side"] = reference.side
    with atomic_file(path, argument) as partial, partial.open("wb") as file:
        np.savez(file, **arrays, **{name: np.array(word) for name, word in words.items()})  # type: ignore[arg-type]


def _count(arrays: Arrays, path: Path) -> int:
    """Images behind the statistics; 0 where the file does not say, as published ones do not."""
    if "num_samples" not in arrays:
        return 0
    found = arrays["num_samples"]
    require(
        found.shape == () and found.dtype.kind in "iu" and int(found) >= 2,
        f"`reference` must hold num_samples, a whole number from 2, and that of {path} is {found.tolist()!r:.40}.",
    )
    return int(found)


def _features(arrays: Arrays, width: int, path: Path) -> torch.Tensor | None:
    if "features" not in arrays:
        return None
    found = arrays["features"]
    require(
        found.ndim == 2 and found.shape[1] == width and found.dtype.kind == "f",
        f"`reference` must hold features (n, {width}) as floats, and those of {path} are {found.dtype} {found.shape}.",
    )
    require(bool(np.isfinite(found).all()), f"`reference` must hold finite features, and those of {path} are not.")
    return torch.from_numpy(found.astype(np.float32, copy=False))


def _statistics(arrays: Arrays, end: str, count: int, path: Path) -> Statistics | None:
    if f"mu{end}" not in arrays:
        return None
    require(f"sigma{end}" in arrays, f"`reference` must hold sigma{end} beside mu{end}, and {path} does not.")
    mean, covariance = arrays[f"mu{end}"], arrays[f"sigma{end}"]
    require(
        mean.ndim == 1
        and covariance.shape == (len(mean), len(mean))
        and mean.dtype.kind == covariance.dtype.kind == "f",
        f"`reference` must hold mu{end} (D,) and sigma{end} (D, D) as floats, and those of {path} are {mean.dtype} "
        f"{mean.shape} and {covariance.dtype} {covariance.shape}.",
    )
    require(
        bool(np.isfinite(mean).all() and np.isfinite(covariance).all()),
        f"`reference` must hold finite statistics, and mu{end} or sigma{end} of {path} are not.",
    )
    require(
        bool(np.abs(covariance - covariance.T).max() <= 1e-6 * np.abs(covariance).max()),
        f"`reference` must hold a covariance, and sigma{end} of {path} is not symmetric.",
    )
    return Statistics(
        mean=torch.from_numpy(mean.astype(np.float64)),
        covariance=torch.from_numpy(covariance.astype(np.float64)),
        num_samples=count,
    )


def _open(path: Path, read: Any) -> Any:  # noqa: ANN401 (arrays of a file -> what is wanted of them)
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return read(arrays)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"`reference` must be a whole npz file, and {path} is damaged or none.") from error
