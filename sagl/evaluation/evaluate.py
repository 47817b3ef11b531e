"""Evaluation of images against a reference, in all processes of a command."""

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sagl.data.webdataset_files import local_path
from sagl.errors import require
from sagl.evaluation.extraction import FeatureExtraction
from sagl.evaluation.image_sets import ImageSet, RunImages, describe_unreadable, open_image_set
from sagl.evaluation.reference import extract_reference, load_reference
from sagl.evaluation.results import EvaluationResult
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.compute import compute_metrics
from sagl.metrics.features import describe_resize
from sagl.metrics.inception_score import CHUNK
from sagl.metrics.statistics_file import Reference, has_statistics, read_extractor, write_reference
from sagl.models.zoo import default_reference
from sagl.sampling.run_folder import is_run, list_shards, read_run_json
from sagl.settings.evaluation import (
    DEFAULT_EXTRACTOR,
    EXTRACTOR_NAMES,
    INCEPTION,
    ExtractionSettings,
    MetricSettings,
)
from sagl.settings.sampling import DeviceSettings
from sagl.utils.distributed import launch


def evaluate(
    images: str,
    reference: str | None,
    *,
    num_samples: int | None = None,
    extraction: ExtractionSettings,
    metrics: MetricSettings,
    devices: DeviceSettings,
) -> EvaluationResult:
    """Compute the metrics of a set of images against a reference. Only rank 0 returns.

    Args:
        images: an image set, see `open_image_set`.
        reference: an image set, or a statistics file; None for that of the bundled network whose run `images` is.
        num_samples: number of images, the first of the set; None for all.
        extraction: settings of the extraction of features.
        metrics: settings of the metrics.
        devices: processes and devices.

    Raises:
        UserError: an input does not exist, is damaged or too small, or the inputs do not match.
    """
    start_time = time.monotonic()
    with launch(devices) as ranks:
        image_set = open_image_set(local_path(images, "images"), extraction.image_size, "images")
        reference = reference or default_reference(_model(Path(images)))
        reference_path = local_path(reference, "reference")
        name = extraction.extractor or default_extractor(Path(reference_path))
        count, run_notes = _check_num_samples(num_samples, image_set, images), _run_notes(Path(images), image_set)
        _check_num_neighbors(metrics.num_neighbors, count)
        ids = _format_ids(list_shards(Path(images)), count) if isinstance(image_set, RunImages) else ""
        extractor = FeatureExtraction.load(name, extraction, ranks)
        real = load_reference(reference_path, extractor, image_set.image_size, metrics.max_features)
        fake = extractor.statistics(image_set, count, max_features=count, title=Path(images).name, keep_logits=True)
    assert real is not None
    assert fake is not None
    results = compute_metrics(fake, real.statistics, metrics, inception=name == INCEPTION)
    resize = describe_resize(extractor.extract)
    settings = _effective_settings(metrics, fake, real.statistics)
    return EvaluationResult(
        images=images,
        num_samples=fake.num_samples,
        ids=ids,
        reference=reference,
        reference_digest=real.digest,
        reference_crop_size=real.crop_size,
        num_reference=real.statistics.num_samples or None,
        extractor=name,
        extractor_version=extractor.version,
        resize=resize,
        settings=settings | ({"image_size": extraction.image_size} if extraction.image_size else {}),
        notes=(
            *run_notes,
            *filter(None, [describe_unreadable(count, fake.num_samples)]),
            *real.notes,
            *_comparability_notes(fake, real, image_set, resize),
        ),
        seconds=round(time.monotonic() - start_time, 1),
        **vars(results),
    )


def write_statistics(
    source: str,
    output: Path,
    *,
    num_samples: int | None = None,
    max_features: int = MetricSettings.max_features,
    extraction: ExtractionSettings,
    devices: DeviceSettings,
) -> Reference:
    """Extract features of a set of images, write their statistics to a file and return them. Only rank 0 returns.

    Raises:
        UserError: the images do not exist or are damaged, or the file cannot be written.
    """
    require(max_features >= 2, f"`max_features` must be at least 2, got {max_features}.")
    name = extraction.extractor or DEFAULT_EXTRACTOR
    with launch(devices) as ranks:
        images = open_image_set(local_path(source, "source"), extraction.image_size, "source")
        count = _check_num_samples(num_samples, images, source)
        extractor = FeatureExtraction.load(name, extraction, ranks)
        reference = extract_reference(source, images, count, extractor, max_features, "source")
    assert reference is not None
    write_reference(reference, output)
    return reference


def _model(run: Path) -> str | None:
    """Return the name of the network of a run; None for other images."""
    return read_run_json(run, "images").get("model") if is_run(run) else None


def default_extractor(reference: Path) -> str:
    """Return the extractor of a statistics file, which may name one of sagl's only: no file names code to run."""
    name = read_extractor(reference) if has_statistics(reference) else DEFAULT_EXTRACTOR
    require(
        name in EXTRACTOR_NAMES,
        f"`extractor` must be given for {reference}, which names {name!r:.60}. Code that a file names is not run.",
    )
    return name


def _check_num_samples(num_samples: int | None, images: ImageSet, name: str) -> int:
    count = len(images) if num_samples is None else num_samples
    require(2 <= count <= len(images), f"`num_samples` must be 2 … {len(images)} for {name}, got {count}.")
    return count


def _check_num_neighbors(num_neighbors: int, count: int) -> None:
    require(num_neighbors < count, f"`num_neighbors` must be below {count}, the number of images, got {num_neighbors}.")


def _effective_settings(s: MetricSettings, fake: FeatureStatistics, real: FeatureStatistics) -> dict[str, Any]:
    """Return the settings that the values depend on; sets smaller than a setting reduce it."""
    settings = asdict(s) | ({} if fake.logits is None else {"is_chunk": CHUNK})
    if real.features is None:  # a file of mean and covariance only allows the Fréchet distance
        return {name: value for name, value in settings.items() if name in ("bootstrap", "seed", "is_chunk")}
    num_features = len(real.features)
    subset_size = min(s.kid_subset_size, fake.num_samples, num_features)
    return settings | {"max_features": num_features, "kid_subset_size": subset_size}


def _run_notes(run: Path, images: ImageSet) -> list[str]:
    requested = read_run_json(run, "images").get("num_samples", 0) if isinstance(images, RunImages) else 0
    unfinished = f"The run holds {len(images)} of {requested} images so far." if len(images) < requested else ""
    return [note for note in (*images.source_notes, images.preprocessing_note, unfinished) if note]


def _format_ids(spans: Iterable[tuple[int, int]], count: int) -> str:
    """Return the first ids of a run as ranges, "0-63, 128-191".

    Args:
        spans: first and last id of every shard, in order. Shards may overlap.
        count: number of ids.
    """
    ranges: list[tuple[int, int]] = []
    for first, last in spans:
        last = min(last, first + count - 1)
        if last < first:
            break
        count -= last - first + 1
        start = ranges.pop()[0] if ranges and first == ranges[-1][1] + 1 else first
        ranges.append((start, last))
    return ", ".join(f"{first}-{last}" for first, last in ranges)


def _comparability_notes(fake: FeatureStatistics, real: Reference, images: ImageSet, resize: str) -> list[str]:
    """Return notes on why the values may not be comparable with others."""
    notes, num_dims = [], len(fake.pooled.mean)
    fewest = min(fake.num_samples, real.statistics.num_samples or fake.num_samples)
    if fewest <= num_dims:
        notes.append(
            f"{fewest} images for {num_dims} features: the covariance does not have full rank, and the Fréchet "
            "distance is far above that of many images. Compare it only with others of the same count."
        )
    if real.image_size not in (None, images.image_size):
        (height, width), (real_height, real_width) = images.image_size, real.image_size
        notes.append(
            f"The images have {width}×{height} pixels, those of the reference {real_width}×{real_height}; the "
            f"extractor resizes both: {resize}."
        )
    return notes
