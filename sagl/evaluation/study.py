"""Studies of sampling settings: features of sampled images, stored batch by batch, and metrics over equal ids.

A study that was interrupted goes on with the missing batches, and studies in one folder share what they sample.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from sagl.diffusion.respacing import respaced_timesteps
from sagl.errors import UserError, require
from sagl.evaluation.extraction import FeatureExtraction
from sagl.guidance.registry import GUIDANCES
from sagl.metrics.bootstrap import Interval, paired_difference, resampled_rows
from sagl.metrics.features import extract_features
from sagl.metrics.frechet import FrechetReference, statistics
from sagl.metrics.precision_recall import NUM_NEIGHBORS, knn_radii, precision_recall
from sagl.metrics.statistics_file import Reference
from sagl.sampling.batch import sample_batch
from sagl.sampling.guidance_files import guidance_digests, guidance_files
from sagl.sampling.pipeline import SamplingPipeline, build_pipeline
from sagl.sampling.run import SampleConfig, SamplingRun
from sagl.settings.guidance import GuidanceSettings
from sagl.settings.sampling import ProgressKind, RunSettings, SamplerSettings, id_batches
from sagl.utils.archives import read_arrays
from sagl.utils.digest_cache import weights_sha256
from sagl.utils.files import atomic_file, file_version, json_sha256, sha256, write_text
from sagl.utils.images import to_rgb, to_uint8
from sagl.utils.json_values import finite_or_none
from sagl.utils.progress import ProgressReporter

FEATURES, BATCH_SIZES = "features", "batch_sizes.json"
"""Folder of the features in the output folder; file in it with the batch size of each network and precision."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A sampler and its guidance: what a study varies."""

    sampler: SamplerSettings
    guidances: Mapping[str, GuidanceSettings] = field(default_factory=dict)
    """Settings of guidance methods by name."""

    @property
    def unguided(self) -> "Setting":
        """The same sampler without guidance."""
        return Setting(sampler=self.sampler)

    @property
    def values(self) -> dict[str, Any]:
        """Everything that determines an image, as JSON values; guidance of scale 0 determines nothing."""
        active = {name: asdict(guidance) for name, guidance in self.guidances.items() if guidance.scale}
        result: dict[str, Any] = json.loads(json.dumps({**asdict(self.sampler), **active}))
        return result


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of some ids in one setting."""

    setting: Setting
    pooled: Tensor
    """(N, D) float32; nan for an image that is not finite, as guidance that overflows gives it."""
    nfe: float
    """Mean number of network evaluations per image."""


def prepare_run(config: SampleConfig) -> SamplingRun:
    """Check the configuration of a study, as `SamplingRun.without_folder` does; write nothing.

    A batch size that is left open is that of the features in the output folder: they are not found with another one,
    and one that is chosen anew may differ with the free memory and the number of processes.

    Raises:
        UserError: the configuration does not fit the network or the machine, or the record of the folder is damaged.
    """
    run = SamplingRun.without_folder(config)
    if config.samples.batch_size is not None or not (sizes := _read_batch_sizes(config.output / FEATURES)):
        return run
    size = sizes.get(_batch_size_key(weights_sha256(run.checkpoint), run.config.devices.precision))
    if size is None:
        return run
    return replace(run, config=replace(run.config, samples=replace(run.config.samples, batch_size=size)))


def _batch_size_key(digest: str, precision: str) -> str:
    return f"{digest} {precision}"


def _read_batch_sizes(folder: Path) -> dict[str, int]:
    path = folder / BATCH_SIZES
    try:
        sizes = dict(json.loads(path.read_text())) if path.is_file() else {}
        require(
            all(type(size) is int and size > 0 for size in sizes.values()), "a batch size is not a whole number above 0"
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"`output` must have an intact {BATCH_SIZES}, and {path} is damaged: {error}. Delete it, and give the "
            "`batch_size` of the features."
        ) from error
    return sizes


@dataclass(kw_only=True)
class Study:
    """A network whose images are sampled in many settings. All ranks hold one and call `sample` in the same order."""

    folder: Path
    """Folder of the features, one file per setting and batch."""
    pipeline: SamplingPipeline
    """The network on its device."""
    samples: RunSettings
    """Seed, labels and batch size."""
    extraction: FeatureExtraction
    identity: Mapping[str, Any]
    """Everything that determines features besides the setting and the id, as JSON values."""
    _pipelines: dict[str, SamplingPipeline] = field(default_factory=dict)
    """The pipeline of the last setting, which may hold further networks."""
    _files: dict[str, dict[str, Path]] = field(default_factory=dict)
    """Weight files of the guidance of every setting by parameter, kept because a name on the Hub costs a request."""
    _versions: dict[Path, bytes] = field(default_factory=dict)
    """Versions of the weight files of guidance methods at their first use."""

    @classmethod
    def open(cls, run: SamplingRun, extraction: FeatureExtraction) -> "Study":
        """Load the network of a run of `prepare_run`, whose sampler and guidance are not used.

        Raises:
            UserError: the weights cannot be read.
        """
        config, varying = run.config, {"compare", "first_id", *asdict(run.config.sampler), *GUIDANCES}
        identity = {name: value for name, value in config.image_settings.items() if name not in varying}
        identity |= {"weights_sha256": sha256(run.checkpoint), "extractor": extraction.name}
        if extraction.version:  # weights or code of the user, which change under the same name
            identity["extractor_version"] = extraction.version
        identity["batch_size"] = config.samples.effective_batch_size
        network, diffusion = config.source.network, config.source.diffusion
        if network is not None:  # the weight file does not contain them
            identity |= {"network": asdict(network), "diffusion": diffusion and asdict(diffusion)}
        return cls(
            folder=config.output / FEATURES,
            pipeline=run.build_pipeline(extraction.ranks.device).unguided,
            samples=run.config.samples,
            extraction=extraction,
            identity=identity,
        )

    def pipeline_for(self, setting: Setting) -> SamplingPipeline:
        """Return the pipeline of a setting.

        Raises:
            UserError: the setting does not fit the network, or a weight file of its guidance has changed.
        """
        key = str(self._values(setting))
        if key not in self._pipelines:
            base, sampler, guidances = self.pipeline, setting.sampler, setting.guidances
            pipeline = build_pipeline(base.network, base.diffusion, sampler, guidances, checkpoint=base.checkpoint)
            self._pipelines = {key: pipeline}
        return self._pipelines[key]

    def missing(self, settings: Sequence[Setting], ids: range) -> list[tuple[Setting, list[int]]]:
        """Return the settings and whole batches that contain `ids` and are not in the folder yet, each once."""
        distinct = {str(self._values(setting)): setting for setting in settings}
        return [
            (setting, batch)
            for setting in distinct.values()
            for batch in self._batches(ids)
            if not is_whole(self._path(setting, batch))
        ]

    def num_images(self, ids: range) -> int:
        """Return the number of images in the whole batches that contain `ids`."""
        return sum(map(len, self._batches(ids)))

    def sample(self, settings: Sequence[Setting], ids: range, title: str = "", progress: ProgressKind = "off") -> None:
        """Sample the missing batches in all ranks, and store their features.

        Raises:
            UserError: an image without guidance is not finite, or a file cannot be written.
        """
        ranks = self.extraction.ranks
        jobs = ranks.broadcast(self.missing(settings, ids) if ranks.rank == 0 else None)
        if jobs and ranks.rank == 0:
            self._record_batch_size()
        with ProgressReporter(title, sum(len(batch) for _, batch in jobs), progress if ranks.rank == 0 else "off") as p:
            for setting, batch in ranks.share(jobs):
                features = self._compute_features(setting, batch)
                with atomic_file(self._path(setting, batch)) as partial, partial.open("wb") as file:
                    np.savez(file, pooled=features.pooled.numpy(), nfe=features.nfe)
                p.advance(min(len(batch) * ranks.world_size, (p.total or 0) - p.completed))
            ranks.wait()

    def features(self, setting: Setting, ids: range) -> Features:
        """Read the features of some ids, which must have been sampled."""
        batches, parts = self._batches(ids), []
        for batch in batches:
            with np.load(self._path(setting, batch)) as arrays:
                parts.append((arrays["pooled"], float(arrays["nfe"])))
        first = ids.start - batches[0][0]
        pooled = np.concatenate([pooled for pooled, _ in parts])[first : first + len(ids)]
        return Features(setting=setting, pooled=torch.from_numpy(pooled), nfe=mean(nfe for _, nfe in parts))

    def at_equal_cost(self, setting: Setting, nfe: float) -> Setting:
        """Return unguided sampling with so many steps that it takes about `nfe` network evaluations.

        The timesteps are respaced as those of `setting` if that is possible, else evenly.
        """
        plain, num_timesteps = self.pipeline_for(setting.unguided), self.pipeline.diffusion.num_timesteps
        num_steps = min(round(nfe * plain.schedule.num_steps / plain.nfe), num_timesteps)
        respacing = f"{setting.sampler.respacing.rstrip('0123456789,')}{num_steps}"
        try:
            respaced_timesteps(respacing, num_timesteps)
        except UserError:  # there is no integer stride for so many steps
            respacing = str(num_steps)
        return Setting(sampler=replace(setting.sampler, respacing=respacing))

    def _record_batch_size(self) -> None:
        """Record the batch size for `prepare_run`, unless one is recorded for this network and precision.

        One that the number of images limits, as in a first trial, is left out: larger searches need a larger one.
        """
        sizes, size = _read_batch_sizes(self.folder), self.samples.effective_batch_size
        key = _batch_size_key(self.identity["weights_sha256"], self.identity["precision"])
        if key not in sizes and size < self.samples.num_samples:
            sizes[key] = size
            write_text(self.folder / BATCH_SIZES, json.dumps(sizes, indent=1) + "\n")

    def _compute_features(self, setting: Setting, batch: list[int]) -> Features:
        pipeline = self.pipeline_for(setting)
        result = sample_batch(pipeline, self.samples, batch, may_overflow=bool(pipeline.guidances))
        overflowed = ~result.images.isfinite().flatten(1).all(dim=1).cpu()
        pooled = extract_features(to_rgb(to_uint8(result.images.nan_to_num())).cpu(), self.extraction.extract).pooled
        require(bool(pooled.isfinite().all()), f"`extractor` {self.extraction.name} must give finite features.")
        return Features(setting=setting, pooled=pooled.masked_fill(overflowed[:, None], math.nan), nfe=result.nfe)

    def _batches(self, ids: range) -> list[list[int]]:
        return list(id_batches(replace(self.samples, first_id=ids.start, num_samples=len(ids))))

    def _path(self, setting: Setting, batch: list[int]) -> Path:
        return self.folder / json_sha256({**self.identity, **self._values(setting)})[:16] / f"{batch[0]}.npz"

    def _values(self, setting: Setting) -> dict[str, Any]:
        """Return the values of a setting, with the digests of the weight files of its guidance in place of their names.

        Raises:
            UserError: such a file does not exist, or has changed since its first use in this study.
        """
        key = str(setting.values)
        if key not in self._files:
            self._files[key] = guidance_files(setting.guidances, self.pipeline.checkpoint)
        files = self._files[key]
        for name, path in files.items():
            version = file_version(path) if path.is_file() else b""
            require(
                self._versions.setdefault(path, version) == version,
                f"`{name}` must be a file that does not change during a study, and {path} was replaced or deleted. "
                "Repeat the command: features of the earlier file are not used again.",
            )
        values, digests = setting.values, guidance_digests(files)
        for parameter in digests:
            group, _, name = parameter.partition(".")
            del values[group][name]
        return {**values, **({"guidance_sha256": digests} if digests else {})}


def is_whole(path: Path) -> bool:
    """Return whether a file of features exists and is not damaged; another one is written again."""
    try:
        return path.is_file() and read_arrays(path, ["pooled", "nfe"]).keys() == {"pooled", "nfe"}
    except BadZipFile:
        return False


# ------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Metrics of one setting over some ids."""

    setting: Setting
    nfe: float
    """Mean number of network evaluations per image."""
    num_samples: int
    values: Mapping[str, float]
    """`fd`, the Fréchet distance, and `precision` and `recall` if the reference has enough features.

    `fd` is infinite, and the others are missing, if an image is not finite."""
    resamples: Tensor
    """Fréchet distances of bootstrap resamples, the same ids for all settings; empty if `fd` is infinite."""

    @property
    def json_values(self) -> dict[str, float | None]:
        """The metrics as JSON values: None for an infinite distance."""
        return {name: finite_or_none(value) for name, value in self.values.items()}

    def difference(self, other: "Measurement") -> Interval | None:
        """Return the Fréchet distance minus that of `other` over the same ids, with its paired 95 % interval.

        None without resamples of both.
        """
        if not (len(self.resamples) and len(other.resamples)):
            return None
        return paired_difference(self.values["fd"] - other.values["fd"], other.resamples, self.resamples)


class Comparison:
    """Comparison of settings over equal ids by their distances from a reference."""

    def __init__(self, reference: Reference, *, num_resamples: int = 200, seed: int = 0) -> None:
        """Prepare the reference; `num_resamples` and `seed` are those of the paired bootstrap."""
        self._frechet = FrechetReference(reference.statistics.pooled)
        real = reference.statistics.features
        self._real = real if real is not None and len(real) > NUM_NEIGHBORS else None
        self._real_radii = None if self._real is None else knn_radii(self._real)
        self._num_resamples, self._seed = num_resamples, seed

    def distance(self, pooled: Tensor) -> float:
        """Return the Fréchet distance of (N, D) features from the reference; infinity if one is not finite."""
        return self._frechet(statistics(pooled)) if pooled.isfinite().all() else math.inf

    def measure(self, features: Features) -> Measurement:
        """Compute all metrics of a setting."""
        pooled, values = features.pooled, {"fd": self.distance(features.pooled)}
        is_finite = math.isfinite(values["fd"])
        if is_finite and self._real is not None and len(pooled) > NUM_NEIGHBORS:
            values |= precision_recall(pooled, self._real, real_radii=self._real_radii)._asdict()
        resamples = resampled_rows(len(pooled), self._num_resamples if is_finite else 0, self._seed)
        return Measurement(
            setting=features.setting,
            nfe=features.nfe,
            num_samples=len(pooled),
            values=values,
            resamples=self._frechet.of_resamples(pooled, resamples),
        )
