"""What `sagl evaluate` and `sagl statistics` look at, and the processes that look."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from sagl.commands.crew import Crew, crew_of, looked_at
from sagl.commands.work import Work
from sagl.errors import UserError, require
from sagl.evaluation.image_sets import SPLITS, ImageSet, SourceImages, fingerprint, image_set
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.checks import require_finite_features
from sagl.metrics.extractors import get_extractor
from sagl.metrics.features import Extractor, describe_resize
from sagl.metrics.reference import Reference, has_images, has_statistics, read_reference, write_reference
from sagl.settings.evaluation import EXTRACTOR_NAMES
from sagl.utils.distributed import has_peers, select_device
from sagl.utils.files import cache_folder
from sagl.utils.progress import ProgressReporter, show_progress


@dataclass(frozen=True, kw_only=True)
class Look:
    """A set of images to be looked at; every process opens it for itself."""

    source: str
    """A name on the command line; see `image_set`."""
    image_size: int | None
    """To which pictures are cut."""
    wanted: int
    """The first so many."""
    max_features: int
    """Features kept of them."""

    def images(self) -> ImageSet:
        """The set."""
        return image_set(self.source, self.image_size)


class Looking:
    """The sets of one command: what must be looked at, and what was seen."""

    def __init__(self, work: Work, extract: Extractor) -> None:
        """With an extractor that is at hand."""
        self.work, self.extract = work, extract
        self._looks: list[Look] = []
        self._seen: list[FeatureStatistics] = []

    def ask(self, look: Look) -> int:
        """Have a set looked at; -> its place in what was seen."""
        self._looks.append(look)
        return len(self._looks) - 1

    def look(self) -> None:
        """Look at all that was asked for, in all processes of this command."""
        if self._looks or has_peers():
            self._seen = look_together(self.work, self._looks, self.extract)

    def __getitem__(self, place: int) -> FeatureStatistics:
        """What was seen of a set."""
        return self._seen[place]


def look_together(work: Work, looks: Sequence[Look] | None, extract: Extractor) -> list[FeatureStatistics]:
    """Look at sets of images, in all processes of this command.

    Args:
        work: how.
        looks: of the first process; None in the others, which hear of them.
        extract: the extractor.

    Returns:
        What was seen, in the first process; nothing in the others.
    """
    with crew_of(work.device) as crew:
        seen = [_look(work, look, extract, crew) for look in crew.told(looks)]
    return [looked for looked in seen if looked is not None]


def follow(work: Work) -> None:
    """Look as the first process says; for all the others."""
    try:
        look_together(work, None, extractor_of(work))
    except UserError:
        return  # the first process says it


def extractor_of(work: Work) -> Extractor:
    """Made, and where it computes.

    Raises:
        UserError: there is none of this name, or what it needs is not there.
    """
    return get_extractor(work.extractor)(select_device(work.device))


def _look(work: Work, look: Look, extract: Extractor, crew: Crew) -> FeatureStatistics | None:
    with ExitStack() as stack:
        title = f"{work.extractor} of {Path(look.source).name}"
        watch = (
            stack.enter_context(show_progress(work.progress, title, look.wanted))
            if crew.rank == 0
            else ProgressReporter()
        )
        return looked_at(
            look.images(),
            look.wanted,
            extract,
            crew,
            batch_size=work.batch_size,
            max_features=look.max_features,
            watch=watch,
        )


# ---------------------------------------------------------------------------------------------------- references


@dataclass(kw_only=True)
class Measured:
    """A reference, perhaps still to be looked at."""

    name: str
    looking: Looking
    file: Reference | None = None
    """Statistics at hand."""
    place: int | None = None
    """Of its images among the sets to be looked at."""
    kept: Path | None = None
    """Where what was seen is kept."""
    side: tuple[int, int] | None = None
    """(H, W) of its images, where they are looked at or known."""
    notes: tuple[str, ...] = ()

    def looked(self) -> FeatureStatistics:
        """Statistics and features; from the file, from what was seen, or from both."""
        if self.place is None:
            assert self.file is not None
            return self.file.statistics
        seen = self.looking[self.place]
        require_finite_features("reference", seen.pooled)
        if self.kept is not None:
            made = Reference(
                statistics=seen, extractor=self.looking.work.extractor, source=self.name, image_size=self.side
            )
            try:
                write_reference(made, self.kept, "SAGL_CACHE")
            except UserError as error:  # the numbers need no cache
                print(error, file=sys.stderr)
            self.kept = None
        return seen if self.file is None else replace(self.file.statistics, features=seen.features)


def reference_of(name: str, looking: Looking, side: tuple[int, int], max_features: int) -> Measured:
    """What images are to be measured from.

    Args:
        name: as for a run, or a statistics file.
        looking: asked to look at images.
        side: (H, W) of the images that are measured; a reference's pictures are cut to it.
        max_features: features to keep of a reference.

    Raises:
        UserError: it is not there, damaged, or of another extractor.
    """
    if has_statistics(Path(name)):
        return _of_file(name, looking, max_features)
    size = looking.work.image_size or (side[0] if side[0] == side[1] else None)
    images = counted(name, size, "reference")
    cut = size if isinstance(images, SourceImages) and images.cut else None
    notes = (f"{Path(name).name}: {images.note}",) if images.note else ()
    kept = _cache(name, looking, cut, max_features, isinstance(images, SourceImages))
    if kept is not None and kept.is_file():
        return Measured(name=name, looking=looking, file=read_reference(kept), side=images.side, notes=notes)
    place = looking.ask(Look(source=name, image_size=cut, wanted=len(images), max_features=max_features))
    return Measured(name=name, looking=looking, place=place, kept=kept, side=images.side, notes=notes)


def counted(name: str, image_size: int | None, argument: str) -> ImageSet:
    """A set of at least two images.

    Raises:
        UserError: it is not there, or smaller.
    """
    images = image_set(name, image_size, argument)
    require(len(images) >= 2, f"`{argument}` must hold at least 2 images, and {name} holds {len(images)}.")
    return images


def _of_file(name: str, looking: Looking, max_features: int) -> Measured:
    """A statistics file; its images, where it has some, serve for what it has no features for."""
    found, extractor = read_reference(Path(name)), looking.work.extractor
    images = _images_in(name)
    require(
        found.extractor == extractor or images is not None,
        f"`extractor` must be {found.extractor}, which {name} was made with, got {extractor}. Its numbers cannot be "
        "compared with those of another one.",
    )
    if images is None or (found.statistics.features is not None and found.extractor == extractor):
        return Measured(name=name, looking=looking, file=found, side=found.image_size)
    place = looking.ask(Look(source=name, image_size=None, wanted=len(images), max_features=max_features))
    if found.extractor == extractor:
        return Measured(name=name, looking=looking, file=found, place=place, side=images.side)
    note = f"The statistics of {name} belong to {found.extractor}: measured from its {len(images)} images alone."
    return Measured(name=name, looking=looking, place=place, side=images.side, notes=(note,))


def _images_in(name: str) -> ImageSet | None:
    """`arr_0` of a statistics file, where it has some."""
    return counted(name, None, "reference") if has_images(Path(name)) else None


def _cache(name: str, looking: Looking, cut: int | None, max_features: int, pictures: bool) -> Path | None:
    """Where a data set's statistics are kept; those of runs and npz files, which come and go, are not.

    Nor those of an extractor of one's own, whose code may change.
    """
    if looking.work.extractor not in EXTRACTOR_NAMES:
        return None
    known = fingerprint(name) if name in SPLITS or (pictures and Path(name).suffix != ".npz") else None
    if known is None:
        return None
    parts = (known, looking.work.extractor, *([f"{cut}px"] if cut else []), f"{max_features}")
    return cache_folder() / "statistics" / ("-".join(parts) + ".npz")


def notes_on(
    made: FeatureStatistics, reference: Measured, side: tuple[int, int], extract: Extractor
) -> tuple[str, ...]:
    """What a reader must know before comparing the numbers."""
    notes, width = list(reference.notes), len(made.pooled.mean)
    real = reference.looked()
    fewest = min(made.num_samples, real.num_samples or made.num_samples)
    if fewest <= width:
        notes.append(
            f"{fewest} images for {width} features: the covariance has not full rank, and the Fréchet distance is far "
            "above that of many images. Compare it only with others of the same count."
        )
    if reference.side is not None and reference.side != side:
        notes.append(
            f"The images are {side[1]}×{side[0]}, the reference's {reference.side[1]}×{reference.side[0]}; the "
            f"extractor resizes both: {describe_resize(extract)}."
        )
    return tuple(notes)
