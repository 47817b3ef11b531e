"""One evaluation: images and a reference looked at, and the numbers of both with all that they depend on."""

import time
from dataclasses import asdict

from sagl.commands.measuring import Look, Looking, counted, extractor_of, notes_on, reference_of
from sagl.commands.work import Work
from sagl.data.evaluations import Evaluation
from sagl.metrics.features import resize_of
from sagl.metrics.inception_score import CHUNK
from sagl.metrics.numbers import numbers_of
from sagl.settings.errors import require
from sagl.settings.evaluation import INCEPTION, MeasureSettings


def evaluation_of(run: str, reference: str, num_samples: int | None, work: Work, s: MeasureSettings) -> Evaluation:
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
    wanted = len(images) if num_samples is None else num_samples
    require(2 <= wanted <= len(images), f"`num_samples` must be 2 … {len(images)} for {run}, got {wanted}.")
    extract, side = extractor_of(work), images.side
    looking = Looking(work, extract)
    real = reference_of(reference, looking, side, s.num_kept)
    place = looking.ask(Look(source=run, image_size=work.image_size, wanted=wanted, num_kept=wanted))
    looking.look()
    made, seen = looking[place], real.looked()
    numbers = numbers_of(made, seen, s, inception=work.extractor == INCEPTION)
    return Evaluation(
        images=run,
        num_samples=wanted,
        reference=reference,
        num_reference=seen.num_samples or None,
        extractor=work.extractor,
        resize=resize_of(extract),
        numbers=numbers.values,
        intervals=numbers.intervals,
        deviations=numbers.deviations,
        settings=asdict(s) | {"is_chunk": CHUNK} | ({"image_size": work.image_size} if work.image_size else {}),
        notes=notes_on(made, real, side, extract),
        seconds=round(time.monotonic() - started, 1),
    )
