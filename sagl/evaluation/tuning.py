"""Search for guidance settings by successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943).

All candidates are compared over few ids; the better half goes on to twice as many, until one is left. It is reported on
ids that the search did not use, beside unguided sampling with as many steps and with as many network evaluations.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from sagl.data.webdataset_files import local_path
from sagl.errors import require
from sagl.evaluation.evaluate import default_extractor
from sagl.evaluation.extraction import FeatureExtraction
from sagl.evaluation.reference import load_reference
from sagl.evaluation.study import Comparison, Measurement, Setting, Study, prepare_run
from sagl.guidance.registry import GUIDANCES
from sagl.models.zoo import with_default_classifier
from sagl.sampling.run import SampleConfig, SamplingRun
from sagl.settings.compatibility import check_labels
from sagl.settings.evaluation import ExtractionSettings, MetricSettings, require_extractor
from sagl.settings.network import UNetSettings
from sagl.settings.sampling import ProgressKind
from sagl.settings.tuning import TuningSettings
from sagl.utils.distributed import Ranks

Space = Mapping[str, Sequence[Any]]
"""Values to try by the name of the setting, such as sag.scale."""
VALUES: dict[str, tuple[Any, ...]] = {
    "scale": (0.1, 0.2, 0.5, 1.0, 2.0),
    "interval": ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0)),
    "blur_sigma": (1.0, 1.5, 3.0),
}
"""Values to try of the settings that methods share by name. All blocks with attention are tried as `site`."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """A comparison of the remaining candidates over the same ids."""

    ids: range
    unguided: float
    """Fréchet distance of unguided sampling."""
    distances: Mapping[int, float]
    """Fréchet distances of the candidates by their numbers; infinity if an image is not finite."""

    @property
    def ranking(self) -> list[int]:
        """Numbers of the candidates, the best first."""
        return sorted(self.distances, key=lambda number: (self.distances[number], number))


@dataclass(frozen=True, kw_only=True)
class TuningResult:
    """Rounds of a search, and the report on the best candidate."""

    rounds: Sequence[Round]
    unguided: Measurement
    best: Measurement
    plain: Measurement
    """Unguided sampling with as many network evaluations as `best`."""
    configured: Measurement | None
    """The guidance that was configured before the search, or None without any."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A planned search. Rank 0 plans it and sends it to the other ranks."""

    run: SamplingRun
    """Network, sampler and samples; `num_samples` is the number of images of a candidate in the first round."""
    space: Space
    candidates: Sequence[Setting]
    settings: TuningSettings
    reference: str
    """An image set, or a statistics file: a name, a path or a URL."""
    extractor: str
    """Feature extractor."""

    @classmethod
    def plan(
        cls, config: SampleConfig, settings: TuningSettings, search: Space, reference: str, extractor: str | None = None
    ) -> "Tuning":
        """Check a request, and return the planned search in the folder `config.output`.

        Args:
            config: network, sampler and samples.
            settings: method and sizes of the search.
            search: values by setting; they replace or extend those of the method.
            reference: an image set, or a statistics file. That of a URL is downloaded once.
            extractor: feature extractor; None: that of the reference.

        Raises:
            UserError: the search space, the network, the extractor or the reference is invalid.
        """
        if extractor is not None:
            require_extractor(extractor)
        num_samples = config.samples.num_samples
        require(num_samples >= 2, f"`num_samples` must be at least 2, got {num_samples}.")
        run = prepare_run(config)
        space = {**default_space(settings.method, run.network), **search}
        candidates = make_candidates(run, space, settings.candidates)
        require(bool(candidates), f"`search` must have a setting of scale above 0, got {space}.")
        return cls(
            run=run,
            space=space,
            candidates=candidates,
            settings=settings,
            reference=reference,
            extractor=extractor or default_extractor(Path(local_path(reference, "reference"))),
        )

    @property
    def rounds(self) -> list[tuple[int, range]]:
        """Number of candidates and ids of each round."""
        samples = self.run.config.samples
        return plan_rounds(len(self.candidates), samples.first_id, samples.num_samples)

    @property
    def report_ids(self) -> range:
        """Ids of the report, which follow those of the search."""
        stop = self.rounds[-1][1].stop
        return range(stop, stop + self.settings.report_samples)

    def open(self, ranks: Ranks) -> tuple[Study, Comparison | None]:
        """Load the network, the extractor and the reference; the comparison is on rank 0 only.

        Raises:
            UserError: one of them does not exist, or is damaged.
        """
        settings = ExtractionSettings(extractor=self.extractor, progress=self.run.config.progress)
        extraction = FeatureExtraction.load(self.extractor, settings, ranks)
        size, reference_path = self.run.network.image_size, local_path(self.reference, "reference")
        reference = load_reference(reference_path, extraction, (size, size), MetricSettings.max_features)
        study = Study.open(self.run, extraction)
        num_resamples = self.settings.bootstrap
        return study, None if reference is None else Comparison(reference, num_resamples=num_resamples)

    def count_evaluations(self, study: Study) -> float:
        """Return the largest number of network evaluations that search and report can take, in whole batches."""
        nfe = [study.pipeline_for(candidate).nfe for candidate in self.candidates]
        unguided_nfe = study.pipeline_for(self.candidates[0].unguided).nfe
        configured = configured_setting(self.run)
        configured_nfe = study.pipeline_for(configured).nfe if configured else 0.0
        search, sampled = 0.0, 0
        for size, ids in self.rounds:
            count = study.num_images(ids)
            search += (count - sampled) * sum(sorted(nfe, reverse=True)[:size], start=unguided_nfe)
            sampled = count
        return search + study.num_images(self.report_ids) * (unguided_nfe + 2 * max(nfe) + configured_nfe)

    def search(self, study: Study, comparison: Comparison | None, progress: ProgressKind) -> list[Round]:
        """Compare the candidates round by round, in all ranks; those whose images are not finite take part in one.

        Raises:
            UserError: no candidate has finite images.
        """
        unguided, rounds = self.candidates[0].unguided, list[Round]()
        numbers = list(range(len(self.candidates)))
        for size, ids in self.rounds:
            settings = {number: self.candidates[number] for number in numbers[:size]}
            study.sample([unguided, *settings.values()], ids, f"{len(settings)} candidates", progress)
            result = None
            if comparison is not None:
                distances = {n: comparison.distance(study.features(s, ids).pooled) for n, s in settings.items()}
                baseline = comparison.distance(study.features(unguided, ids).pooled)
                result = Round(ids=ids, unguided=baseline, distances=distances)
            rounds.append(study.extraction.ranks.broadcast(result))
            numbers = [number for number in rounds[-1].ranking if math.isfinite(rounds[-1].distances[number])]
            require(
                bool(numbers),
                "`search` must have a setting whose images are finite, but those of every candidate overflowed. Search "
                "lower scales, or set `trainer.precision` to 32-true.",
            )
        return rounds

    def report(
        self, study: Study, comparison: Comparison | None, rounds: Sequence[Round], progress: ProgressKind
    ) -> TuningResult | None:
        """Measure the best candidate on fresh ids, in all ranks. Only rank 0, which has the comparison, returns it."""
        best, configured = self.candidates[rounds[-1].ranking[0]], configured_setting(self.run)
        plain = study.at_equal_cost(best, study.features(best, rounds[-1].ids).nfe)
        settings = [best.unguided, best, plain, *([configured] if configured else [])]
        study.sample(settings, self.report_ids, "report", progress)
        if comparison is None:
            return None
        distinct = {str(setting.values): setting for setting in settings}  # the configured guidance may be the best
        measured = {
            key: comparison.measure(study.features(setting, self.report_ids)) for key, setting in distinct.items()
        }
        return TuningResult(
            rounds=rounds,
            unguided=measured[str(best.unguided.values)],
            best=measured[str(best.values)],
            plain=measured[str(plain.values)],
            configured=measured[str(configured.values)] if configured else None,
        )


# ---------------------------------------------------------------------------------------------- candidates


def default_space(method: str, network: UNetSettings) -> dict[str, Sequence[Any]]:
    """Return the values to try of a method's settings.

    Raises:
        UserError: there is no such method.
    """
    require(method in GUIDANCES, f"`method` must be one of {', '.join(GUIDANCES)}, got {method!r}.")
    values = {**VALUES, "site": tuple(network.sites)}
    names = [field.name for field in fields(GUIDANCES[method].settings_class)]
    return {f"{method}.{name}": values[name] for name in names if name in values}


def make_candidates(run: SamplingRun, space: Space, max_candidates: int) -> list[Setting]:
    """Return combinations of the values, a random choice if there are too many, without duplicates and scale 0.

    The first is the guidance of the run's own configuration, if it has any.

    Raises:
        UserError: a combination does not fit the network or the labels.
    """
    config, configured, combinations = run.config, configured_setting(run), list(product(*space.values()))
    candidates = [configured] if configured else []
    count = min(len(combinations), max_candidates - len(candidates))
    for values in random.Random(config.samples.seed).sample(combinations, count):
        guidances = dict(config.guidances)
        for name, value in zip(space, values, strict=True):
            group, _, field = name.partition(".")
            guidances[group] = with_default_classifier(replace(guidances[group], **{field: value}), config.source.model)
        candidates.append(Setting(sampler=config.sampler, guidances=guidances))
    for candidate in candidates:
        check_labels(config.samples, run.network, candidate.guidances)
        for guidance in candidate.guidances.values():
            if guidance.scale:
                guidance.check_network(run.network)
    return list({str(c.values): c for c in candidates if c.values != c.unguided.values}.values())


def configured_setting(run: SamplingRun) -> Setting | None:
    """Return the guidance of a run's own configuration, or None without any."""
    setting = Setting(sampler=run.config.sampler, guidances=run.config.guidances)
    return setting if setting.values != setting.unguided.values else None


def searched_values(setting: Setting, space: Space) -> dict[str, Any]:
    """Return the searched settings of a candidate by name."""
    parts = {name: name.partition(".") for name in space}
    return {name: getattr(setting.guidances[group], field) for name, (group, _, field) in parts.items()}


def plan_rounds(num_candidates: int, first_id: int, num_samples: int) -> list[tuple[int, range]]:
    """Return the number of candidates and the ids of each round: half as many, rounded up, over twice as many ids."""
    rounds = [(num_candidates, range(first_id, first_id + num_samples))]
    while (size := rounds[-1][0]) > 2:
        rounds.append(((size + 1) // 2, range(first_id, first_id + 2 * len(rounds[-1][1]))))
    return rounds
