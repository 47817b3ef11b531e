"""evaluation.json in a run's folder: the results of `sagl evaluate`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sagl.errors import UserError
from sagl.utils.files import atomic_file, json_sha256
from sagl.utils.json_values import from_json
from sagl.utils.run_lock import lock_file

if TYPE_CHECKING:
    from sagl.metrics.bootstrap import Interval

RESULTS_FILE = "evaluation.json"


class Conditions(NamedTuple):
    """Conditions of an evaluation, which two results must share for their values to be comparable."""

    reference: str
    reference_digest: str
    reference_crop_size: int | None
    """Size that the images of the reference were cropped to; None for images as they are."""
    num_reference: int | None
    extractor: str
    extractor_version: str
    resize: str
    crop_size: int | None
    """Size that images were cropped to; None for images as they are."""
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Values of metrics, with everything that they depend on besides the images."""

    images: str = ""
    """Path or name of the images."""
    extractor: str
    """Name of the feature extractor. Values of different ones cannot be compared."""
    extractor_version: str = ""
    """Text that differs for other weights or code under this name, see `metrics.extractors.extractor_version`. Empty
    for sagl's own extractors with published weights, and in files of versions that did not store it."""
    reference: str
    """Path or name of the reference."""
    num_samples: int
    """Number of images, the first of the run."""
    ids: str = ""
    """Ids of these images in the run, as ranges "0-63, 128-191". Empty for other images, and in files of versions that
    did not store it."""
    reference_digest: str = ""
    """Digest that distinguishes references of one name, see `image_sets.content_digest`."""
    reference_crop_size: int | None = None
    """Size that the images of the reference were cropped to, which may be that of the evaluated images. None for images
    as they are, and in files of versions that did not store it."""
    num_reference: int | None = None
    """Number of reference images, if it is known."""
    resize: str = ""
    """Description of how the extractor resizes images."""
    values: Mapping[str, float]
    """Values by metric: fid, sfid, fd, sfd, is, is_all, precision, recall, kid, kd."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Confidence intervals (low, high) of the metrics that have one."""
    resamples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Values of these metrics in each bootstrap resample."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the metrics."""
    stds: Mapping[str, float] = field(default_factory=dict)
    """Standard deviation of KID over its subsets."""
    notes: tuple[str, ...] = ()
    """Sentences on why the values may not be comparable with others."""
    seconds: float = 0.0
    """Duration of the evaluation."""

    @property
    def conditions(self) -> Conditions:
        """Conditions of the evaluation, besides the settings of the metrics."""
        shared = {name: getattr(self, name) for name in Conditions._fields if name != "crop_size"}
        return Conditions(**shared, crop_size=self.settings.get("image_size"))

    def is_same_measurement(self, other: "EvaluationResult") -> bool:
        """Return whether both results of one run were computed under the same conditions and with the same settings.

        The crop size of the reference follows from the run and the settings, and earlier versions did not store it.
        """
        same_size = replace(other, reference_crop_size=self.reference_crop_size)
        return self.conditions == same_size.conditions and self.settings == other.settings

    def difference(self, other: "EvaluationResult", name: str) -> "Interval | None":
        """Return a metric minus that of `other`, with its 95 % interval by paired bootstrap.

        None if the results are not paired, see `unpaired_reason`.
        """
        if self.unpaired_reason(other, name):
            return None
        import torch  # takes seconds, and most comparisons do without

        from sagl.metrics.bootstrap import paired_difference

        resamples = (torch.tensor(result.resamples[name], dtype=torch.float64) for result in (other, self))
        return paired_difference(self.values[name] - other.values[name], *resamples)

    def unpaired_reason(self, other: "EvaluationResult", name: str) -> str:
        """Return why a metric of both results has no paired difference; empty if it has one.

        Both must have been computed over the same ids, under the same conditions, and resampled alike, with as many
        resamples and the same seed. Results without ids, which earlier versions did not store, count as of the same
        ids.
        """
        if self.conditions != other.conditions:
            return "not paired: other conditions"
        if self.ids and other.ids and self.ids != other.ids:
            return f"not paired: ids {self.ids}"
        first, second = (result.resamples.get(name, ()) for result in (other, self))
        if not first or not second:
            return "not paired: evaluated without `bootstrap`"
        if len(first) != len(second) or any(
            self.settings.get(k) != other.settings.get(k) for k in ("bootstrap", "seed")
        ):
            return "not paired: other `bootstrap` or `seed`"
        return ""


def read_results(folder: Path) -> tuple[EvaluationResult, ...]:
    """Read the results in a run's folder, oldest first; empty if it was not evaluated.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        return ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("sha256", digest := json_sha256(content["results"])) != digest:
            raise ValueError("other values than those written")
        return tuple(from_json(EvaluationResult, entry) for entry in content["results"])
    except (OSError, ValueError, LookupError, OverflowError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"`run` {folder} has a damaged file {path}. Delete it, and evaluate the run again.") from error


def save_result(folder: Path, result: EvaluationResult) -> None:
    """Append a result to the run's file, in place of an older one of the same measurement.

    Raises:
        UserError: the file is damaged, or cannot be written.
    """
    path = folder / RESULTS_FILE
    with lock_file(path, "run"), atomic_file(path, "run") as partial:
        others = [other for other in read_results(folder) if not result.is_same_measurement(other)]
        entries = [asdict(entry) for entry in (*others, result)]
        content = {"results": entries, "sha256": json_sha256(entries)}
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
