"""Statistics of the reference of an evaluation: from a statistics file, from the cache, or from images."""

import sys
from dataclasses import replace
from pathlib import Path

from sagl.errors import UserError, require
from sagl.evaluation.extraction import FeatureExtraction
from sagl.evaluation.image_sets import (
    DIGEST_DIGITS,
    ImageSet,
    RunImages,
    Size,
    cache_key,
    content_digest,
    describe_unreadable,
    open_image_set,
)
from sagl.metrics.compute import require_finite_features
from sagl.metrics.statistics_file import Reference, has_images, has_statistics, read_reference, write_reference
from sagl.settings.evaluation import EXTRACTOR_NAMES
from sagl.utils.files import cache_folder, partial_pattern, remove_partial, sha256


def load_reference(name: str, extraction: FeatureExtraction, image_size: Size, max_features: int) -> Reference | None:
    """Return the statistics of a reference on rank 0, None on the others. All ranks must call it.

    Args:
        name: an image set, see `open_image_set`, or a statistics file.
        extraction: the extractor.
        image_size: (H, W) of the evaluated images; images of a reference are cropped and resized to it.
        max_features: maximum number of features of the reference.

    Raises:
        UserError: it does not exist, is damaged, or belongs to another extractor or to another version of it.
    """
    if has_statistics(Path(name)):
        return _from_file(name, extraction, max_features)
    size = extraction.settings.image_size or (image_size[0] if image_size[0] == image_size[1] else None)
    images = open_image_set(name, size, "reference")
    path = _cache_path(name, images, extraction, max_features)
    if extraction.ranks.broadcast(path is not None and path.is_file()):
        assert path is not None
        if extraction.ranks.rank > 0:
            return None
        cached = read_reference(path)
        return _as_read(replace(cached, digest=cached.digest or content_digest(name, images)), images, name)
    reference = extract_reference(name, images, len(images), extraction, max_features, "reference")
    if reference is None:
        return None
    reference = replace(reference, digest=content_digest(name, images))
    if path is not None:
        remove_partial(path.parent, partial_pattern(path))
        try:
            write_reference(reference, path, "SAGL_CACHE")
        except UserError as error:  # the cache only saves time
            print(error, file=sys.stderr)
    return _as_read(reference, images, name)


def reference_digest(name: str) -> str:
    """Return the digest of a reference as `load_reference` gives it, without extracting features.

    Args:
        name: an image set, see `open_image_set`, or a statistics file.

    Raises:
        UserError: it does not exist, or is damaged.
    """
    if has_statistics(Path(name)):
        return sha256(Path(name))[:DIGEST_DIGITS]
    return content_digest(name, open_image_set(name, None, "reference"))


def _as_read(reference: Reference, images: ImageSet, name: str) -> Reference:
    """Add the size that the images were cropped to, and notes on how they were read."""
    notes = (images.preprocessing_note, describe_unreadable(len(images), reference.statistics.num_samples))
    described = (f"{Path(name).name}: {note}" for note in notes if note)
    return replace(reference, crop_size=images.crop_size, notes=(*images.source_notes, *described))


def extract_reference(
    source: str, images: ImageSet, count: int, extraction: FeatureExtraction, max_features: int, argument: str
) -> Reference | None:
    """Extract features of the first `count` images; return their statistics on rank 0, None on the others.

    The digest of the images is not computed. `argument` is the name of `source` in messages.

    Raises:
        UserError: too many images are damaged, or features are not finite.
    """
    statistics = extraction.statistics(images, count, max_features=max_features, title=Path(source).name)
    if statistics is None:
        return None
    require_finite_features(argument, statistics.pooled)
    return Reference(
        statistics=statistics,
        extractor=extraction.name,
        extractor_version=extraction.version,
        source=source,
        image_size=images.image_size,
        notes=images.source_notes,
    )


def _from_file(name: str, extraction: FeatureExtraction, max_features: int) -> Reference | None:
    """Read a statistics file; its images, if it has any, give the features that it lacks."""
    file = replace(read_reference(Path(name)), digest=sha256(Path(name))[:DIGEST_DIGITS])
    same_extractor = file.extractor == extraction.name
    require(
        same_extractor or has_images(Path(name)),
        f"`extractor` must be {file.extractor}, which {name} was made with, got {extraction.name}. Metrics of "
        "different extractors cannot be compared.",
    )
    require(
        not same_extractor or file.extractor_version in ("", extraction.version),
        f"`reference` must be of the weights and code that {extraction.name} has now, and {name} is of others (version "
        f"{file.extractor_version!r:.60}, now {extraction.version!r:.60}). Write it again with sagl statistics.",
    )
    if not has_images(Path(name)) or (file.statistics.features is not None and same_extractor):
        return file
    images = open_image_set(name, None, "reference")
    reference = extract_reference(name, images, len(images), extraction, max_features, "reference")
    if reference is None:
        return None
    reference = replace(reference, digest=file.digest)
    if same_extractor:
        return replace(reference, statistics=replace(file.statistics, features=reference.statistics.features))
    note = f"The statistics of {name} are of {file.extractor}: only its {len(images)} images are used."
    return replace(reference, notes=(note,))


def _cache_path(name: str, images: ImageSet, extraction: FeatureExtraction, max_features: int) -> Path | None:
    """Return the cached statistics file of a data set.

    Runs and npz files, which change often, and extractors of the user, whose code may change, are not cached.
    """
    if extraction.name not in EXTRACTOR_NAMES or isinstance(images, RunImages) or Path(name).suffix.lower() == ".npz":
        return None
    key = cache_key(name, images)
    if key is None:
        return None
    crop = f"{images.crop_size}px" if images.crop_size else ""
    parts = (key, extraction.name, extraction.version, crop, f"{max_features}")
    return cache_folder() / "statistics" / ("-".join(filter(None, parts)) + ".npz")
