"""One evaluation: images and a reference looked at, and the numbers of both with all that they depend on."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sagl.commands.measuring import Look, Looking, counted, extractor_of, notes_on, reference_of
from sagl.commands.work import Work
from sagl.errors import UserError, require
from sagl.evaluation.image_sets import ImageSet, RunImages, identity
from sagl.evaluation.results import Evaluation
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.compute import compute_metrics
from sagl.metrics.features import describe_resize
from sagl.metrics.inception_score import CHUNK
from sagl.sampling.run_folder import read_run_json
from sagl.settings.evaluation import INCEPTION, MetricSettings


def evaluation_of(run: str, reference: str, num_samples: int | None, work: Work, s: MetricSettings) -> Evaluation:
    """Measure a set of images from a reference, in all processes of this command.

    Args:
        run: the images; see `image_set`.
        reference: as for the images, or a file of statistics.
        num_samples: the first so many of the images; None for all.
        work: how they are looked at.
        s: how the numbers are taken.

    Raises:
        UserError: something is not there, damaged, too small, or does not go together.
    """
    started = time.monotonic()
    images = counted(run, work.image_size, "run")
    about_run = _of_run(Path(run), images)
    wanted = len(images) if num_samples is None else num_samples
    require(2 <= wanted <= len(images), f"`num_samples` must be 2 … {len(images)} for {run}, got {wanted}.")
    extract, side = extractor_of(work), images.side
    looking = Looking(work, extract)
    real = reference_of(reference, looking, side, s.max_features)
    place = looking.ask(Look(source=run, image_size=work.image_size, wanted=wanted, max_features=wanted))
    looking.look()
    made, seen = looking[place], real.looked()
    numbers = compute_metrics(made, seen, s, inception=work.extractor == INCEPTION)
    return Evaluation(
        images=run,
        num_samples=wanted,
        reference=reference,
        reference_digest=identity(reference),
        num_reference=seen.num_samples or None,
        extractor=work.extractor,
        resize=describe_resize(extract),
        numbers=numbers.values,
        intervals=numbers.intervals,
        deviations=numbers.deviations,
        settings=_used(s, made, seen) | ({"image_size": work.image_size} if work.image_size else {}),
        notes=(*about_run, *notes_on(made, real, side, extract)),
        seconds=round(time.monotonic() - started, 1),
    )


def _used(s: MetricSettings, made: FeatureStatistics, seen: FeatureStatistics) -> dict[str, Any]:
    """The settings as they were used: of fewer features fewer are kept, and subsets are smaller."""
    used = asdict(s) | ({} if made.logits is None else {"is_chunk": CHUNK})
    if seen.features is None:  # a file of mean and covariance gives the Fréchet distance alone
        return {name: value for name, value in used.items() if name in ("bootstrap", "seed", "is_chunk")}
    kept = len(seen.features)
    return used | {"max_features": kept, "kid_subset_size": min(s.kid_subset_size, made.num_samples, kept)}


def _of_run(run: Path, images: ImageSet) -> tuple[str, ...]:
    """What a reader must know of the images."""
    try:
        asked = read_run_json(run).get("num_samples", 0) if isinstance(images, RunImages) else 0
    except UserError as error:
        raise UserError(str(error).replace("`output`", "`run`")) from error
    unfinished = f"The run holds {len(images)} of {asked} images so far." if len(images) < asked else ""
    return tuple(note for note in (images.note, unfinished) if note)
