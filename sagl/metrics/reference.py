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

from sagl.metrics.frechet import Statistics
from sagl.metrics.tally import Looked
from sagl.settings.errors import UserError, require
from sagl.settings.evaluation import INCEPTION
from sagl.settings.paths import whole_file

Arrays = dict[str, "np.ndarray[Any, np.dtype[Any]]"]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A statistics file."""

    looked: Looked
    extractor: str
    source: str = ""
    """What it was made from, where the file says so."""


def holds_statistics(path: Path) -> bool:
    """Whether this is an npz file with statistics.

    Raises:
        UserError: it is a damaged npz file.
    """
    if path.suffix != ".npz" or not path.is_file():
        return False
    return "mu" in _open(path, lambda arrays: arrays.files)


def read_reference(path: Path) -> Reference:
    """A statistics file, ours or a published one; images in it are left alone.

    Raises:
        UserError: it is damaged, or its arrays are not of the right shape or kind.
    """
    names = ("mu", "sigma", "mu_s", "sigma_s", "features", "num_samples", "extractor", "source")
    arrays: Arrays = _open(path, lambda found: {name: found[name] for name in names if name in found.files})
    count = int(arrays.get("num_samples", 0))  # published files do not say
    pooled, spatial = _statistics(arrays, "", count, path), _statistics(arrays, "_s", count, path)
    require(pooled is not None, f"`reference` must hold mu and sigma, and {path} does not.")
    assert pooled is not None
    features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
    require(
        features is None or (features.ndim == 2 and features.shape[1] == len(pooled.mean)),
        f"`reference` must hold features (n, {len(pooled.mean)}), and those of {path} are "
        f"{None if features is None else tuple(features.shape)}.",
    )
    return Reference(
        looked=Looked(pooled=pooled, spatial=spatial, features=features),
        extractor=str(arrays.get("extractor", INCEPTION)),
        source=str(arrays.get("source", "")),
    )


def write_reference(reference: Reference, path: Path) -> None:
    """Our own form, whole or not at all.

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
    words = {"extractor": reference.extractor, "source": reference.source, "num_samples": looked.num_samples}
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays, **{name: np.array(word) for name, word in words.items()})  # type: ignore[arg-type]


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
