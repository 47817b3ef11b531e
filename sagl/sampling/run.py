"""A sampling run: its configuration, and the folder that its images go into.

torch is imported inside the functions that compute, so that a request can be refused before it is loaded.
"""

import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sagl
from sagl.diffusion.respacing import respaced_timesteps
from sagl.errors import require
from sagl.models.sources import NetworkSource
from sagl.sampling.choices import choose_batch_size, choose_precision
from sagl.sampling.guidance_files import check_guidance_files, guidance_digests, guidance_files
from sagl.sampling.run_folder import (
    Sample,
    check_same_run,
    count_images,
    is_run,
    list_shards,
    missing_batches,
    read_run_json,
    remove_damaged,
    remove_superseded,
    write_run_json,
    write_shard,
)
from sagl.settings.compatibility import check_compatible, check_labels
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import GuidanceSettings
from sagl.settings.network import UNetSettings
from sagl.settings.sampling import DeviceSettings, ProgressKind, RunSettings, SamplerSettings, id_batches
from sagl.utils.digest_cache import weights_sha256
from sagl.utils.distributed import num_processes, require_launcher, select_device
from sagl.utils.environment import (
    disable_tf32,
    set_threads,
    use_deterministic_algorithms,
)
from sagl.utils.files import require_writable
from sagl.utils.progress import ProgressReporter
from sagl.utils.run_lock import lock_folder

if TYPE_CHECKING:
    import torch

    from sagl.models.adm import UNet
    from sagl.sampling.batch import BatchImages
    from sagl.sampling.pipeline import SamplingPipeline

EXPORTS = {
    "grid": ("grid.png",),
    "images": ("images/*.png",),
    "npz": ("samples_*.npz",),
    "strip": ("strip.png", "strip.gif"),
}
"""Exports, and patterns of the names that they write."""
DEFAULT_EXPORTS = ("grid", "images", "npz")
DEFAULT_EXPORTS_MAX_IMAGES = 1000
"""Runs with more images than this write only the exports that are requested."""
LIBRARIES = ("torch", "torchvision", "numpy")
"""Libraries whose versions are recorded."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Everything that a sampling run needs, resolved once from command line, config, weight file and defaults."""

    source: NetworkSource
    """Name, weight file and settings of the network."""
    output: Path
    """Run folder."""
    compare: bool
    """Sample the same seeds without guidance too, and save the masks."""
    exports: tuple[str, ...]
    """Exports to write; those of `DEFAULT_EXPORTS` are also written if there are at most 1,000 images."""
    samples: RunSettings
    sampler: SamplerSettings
    guidances: Mapping[str, GuidanceSettings]
    """Settings of all guidance methods by name."""
    devices: DeviceSettings
    progress: ProgressKind = "auto"
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuse `compare` without guidance, and unknown exports."""
        is_guided = any(guidance.scale for guidance in self.guidances.values())
        require(not self.compare or is_guided, "`compare` needs guidance, and all scales are 0. Set `sag.scale`.")
        for name in self.exports:
            require(name in EXPORTS, f"`exports` must be among {', '.join(EXPORTS)}, got {name!r}.")

    @property
    def image_settings(self) -> dict[str, Any]:
        """Return the settings that determine an image; number and batch size of the samples do not."""
        samples = asdict(self.samples)
        del samples["num_samples"], samples["batch_size"]
        return {
            "compare": self.compare,
            **samples,
            **asdict(self.sampler),
            **{name: asdict(guidance) for name, guidance in self.guidances.items()},
            "precision": self.devices.precision,
            "weights": self.source.weights,
            **({"compile": True} if self.devices.compile else {}),
        }

    @property
    def batches(self) -> list[range]:
        """Ids of the samples that each batch contributes to the run."""
        first, end = self.samples.first_id, self.samples.first_id + self.samples.num_samples
        return [range(max(first, ids[0]), min(end, ids[-1] + 1)) for ids in id_batches(self.samples)]


def installed_versions() -> dict[str, str]:
    """Return the versions of Python, sagl and the libraries that compute images."""
    libraries = {name: version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "sagl": sagl.__version__, **libraries}


def lock_run(folder: Path) -> AbstractContextManager[None]:
    """Hold a run folder for this command, unless it is a run that cannot be written to.

    Raises:
        UserError: another command holds it.
    """
    read_only = is_run(folder) and not os.access(folder, os.W_OK)
    return nullcontext() if read_only else lock_folder(folder)


@dataclass(kw_only=True)
class SamplingRun:
    """A run folder and the configuration of its images. Rank 0 opens it and sends it to the other ranks."""

    config: SampleConfig
    """Configuration with the chosen precision and batch size."""
    checkpoint: Path
    network: UNetSettings
    metadata: dict[str, Any]
    """Content of run.json."""
    command: str = ""
    """Command line, which is recorded if images are sampled."""

    @classmethod
    def open(cls, config: SampleConfig, command: str = "") -> "SamplingRun":
        """Check a configuration against the weights, the machine and the content of the folder; write nothing.

        A command that goes on to write calls it under `lock_run`.

        Args:
            config: the configuration.
            command: command line to record if images are sampled.

        Raises:
            UserError: two of them are incompatible.
        """
        require_launcher(config.devices)
        if not is_run(config.output):  # exports of a finished run are the only files that need no writable folder
            require_writable(config.output)
        metadata = read_run_json(config.output)
        network, diffusion, checkpoint = _check_network(config)
        config = choose_precision(config, metadata)
        settings = {**config.image_settings, "weights_sha256": weights_sha256(checkpoint)}
        if config.source.network is not None:  # the weight file does not contain them
            settings |= {"network": asdict(network), "diffusion": asdict(diffusion)}
        if digests := guidance_digests(guidance_files(config.guidances, checkpoint)):
            settings["guidance_sha256"] = digests
        check_same_run(config.output, settings)
        config = choose_batch_size(config, network, metadata)
        metadata = {
            "settings": settings,
            "num_samples": max(config.samples.num_samples, metadata.get("num_samples", 0)),
            "batch_size": config.samples.effective_batch_size,
            "threads": metadata.get("threads"),
            "model": config.source.model,
            "checkpoint": str(checkpoint.resolve()),
            "nfe": metadata.get("nfe", 0),
            "flops": metadata.get("flops", 0),
            "mask_share": metadata.get("mask_share"),
            "seconds": metadata.get("seconds", 0.0),
            "num_timed_batches": metadata.get("num_timed_batches", 0),
            "versions": metadata.get("versions") or installed_versions(),
            "command": metadata.get("command") or command,
            "exports": metadata.get("exports", {}),
        }
        return cls(config=config, checkpoint=checkpoint, network=network, metadata=metadata, command=command)

    @classmethod
    def without_folder(cls, config: SampleConfig) -> "SamplingRun":
        """Check a configuration against the weights and the machine, for images that go into no run folder.

        Raises:
            UserError: they are incompatible.
        """
        require_launcher(config.devices)
        network, _, checkpoint = _check_network(config)
        config = choose_batch_size(choose_precision(config, {}), network, {})
        return cls(config=config, checkpoint=checkpoint, network=network, metadata={})

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.output

    def missing_batches(self) -> list[Sequence[int]]:
        """Return the ids of every batch that is not in the folder yet."""
        return missing_batches(self.folder, self.config.batches)

    def count_sampled(self, batches: Sequence[Sequence[int]]) -> int:
        """Return how many images of these batches are in the folder."""
        shards = list_shards(self.folder)
        return sum(len(ids) for ids in batches if (ids[0], ids[-1]) in shards)

    def prepare_folder(self, batches: Sequence[Sequence[int]]) -> None:
        """Remove damaged shards, and record what is about to sample others: command, versions and threads.

        Raises:
            UserError: the folder cannot be written.
        """
        require_writable(self.folder)
        remove_damaged(self.folder, batches)
        threads, old_threads = set_threads(num_processes(self.config.devices)[0]), self.metadata["threads"]
        if old_threads not in (None, threads):
            print(
                f"{self.folder} was sampled with {old_threads} threads per process, and this command uses {threads}: "
                "new images may differ from those of one command in the last bits."
            )
        versions = installed_versions()
        old = {**versions, **self.metadata["versions"]}
        changes = [f"{name} {old[name]} (now {versions[name]})" for name in versions if old[name] != versions[name]]
        if changes:
            print(
                f"{self.folder} was sampled with {', '.join(changes)}: new images may differ from those of one command."
            )
        self.metadata |= {"command": self.command, "versions": versions, "threads": old_threads or threads}
        self.metadata["exports"] = {}

    def build_pipeline(self, device: "torch.device") -> "SamplingPipeline":
        """Load the weights and build the pipeline.

        Raises:
            UserError: the weights cannot be read, or do not fit the settings or the labels.
        """
        from sagl.sampling.pipeline import build_pipeline

        network, diffusion = self.load_network(device)
        pipeline = build_pipeline(
            network, diffusion, self.config.sampler, self.config.guidances, checkpoint=self.checkpoint
        )
        pipeline.check_labels(are_null=self.config.samples.labels == "null")
        return pipeline

    def load_network(self, device: "torch.device") -> "tuple[UNet, DiffusionSettings]":
        """Load the network in its precision, and the diffusion process that it was trained for.

        Raises:
            UserError: the weights cannot be read.
        """
        from sagl.models.checkpoints import build_network, cast_weights

        config = self.config
        disable_tf32()
        if device.type == "cuda":
            use_deterministic_algorithms()
        checkpoint = config.source.read_weights(self.checkpoint)
        assert config.devices.precision != "auto"
        network = cast_weights(build_network(checkpoint), config.devices.precision, device)
        if config.devices.compile:
            network.compile(dynamic=False)  # all batches have the same size
        return network, checkpoint.diffusion

    def write_batch(
        self, pipeline: "SamplingPipeline", ids: Sequence[int], progress: ProgressReporter
    ) -> "tuple[BatchImages, float]":
        """Sample the whole batch that contains these ids, and write the images of these ids as a shard.

        Returns:
            The images, and the seconds it took, without those of unguided images for `compare`.

        Raises:
            UserError: an image is not finite, or the shard cannot be written.
        """
        from sagl.sampling.batch import make_samples, sample_images

        samples, unguided = self.config.samples, None
        if self.config.compare:
            unguided = sample_images(pipeline.unguided, samples, ids, progress.track_steps)
        start = time.monotonic()
        batch = sample_images(pipeline, samples, ids, progress.track_steps)
        self.write_samples(pipeline, make_samples(samples.seed, batch, unguided))
        return batch, time.monotonic() - start

    def write_samples(self, pipeline: "SamplingPipeline", samples: Sequence[Sample]) -> None:
        """Write the samples of a batch as a shard.

        Raises:
            UserError: the shard cannot be written.
        """
        if not is_run(self.folder):  # a run that never gets an image leaves no folder behind
            metadata = self.metadata | pipeline.cost(pipeline.nfe)  # takes seconds at the first call
            if not is_run(self.folder):  # another process may have recorded a batch meanwhile
                write_run_json(self.folder, metadata)
        write_shard(self.folder, samples)

    def record_batch(self, pipeline: "SamplingPipeline", batch: "BatchImages", seconds: float) -> None:
        """Record the cost of a batch in run.json, and delete superseded shards; for rank 0.

        Args:
            pipeline: the pipeline.
            batch: images of a batch. The means over rank 0's batches are recorded: of the network evaluations of a
                sample, with the floating-point operations that they stand for, and of the share of masked pixels.
            seconds: duration of a batch in every process, added to those of the other batches.
        """
        remove_superseded(self.folder)
        count = self.metadata["num_timed_batches"]

        def mean(name: str, value: float) -> float:
            old: float | None = self.metadata[name]
            return value if old is None else (count * old + value) / (count + 1)

        if batch.mask_share is not None:
            self.metadata["mask_share"] = mean("mask_share", batch.mask_share)
        seconds = round(self.metadata["seconds"] + seconds, 2)
        costs = pipeline.cost(mean("nfe", batch.nfe))
        self.metadata |= {**costs, "seconds": seconds, "num_timed_batches": count + 1}
        write_run_json(self.folder, self.metadata)

    # ------------------------------------------------------------------------------------------------- exports

    def missing_exports(self) -> list[str]:
        """Return the exports that were not made from all images in the folder, or were deleted."""
        count = count_images(self.folder)
        requested = {*self.config.exports, *(DEFAULT_EXPORTS if count <= DEFAULT_EXPORTS_MAX_IMAGES else ())}
        return [name for name in EXPORTS if name in requested and not self._has_export(name, count)]

    def _has_export(self, name: str, count: int) -> bool:
        """Return whether an export was made from so many images, and none of its files is missing."""
        num_files = count if name == "images" else 1
        num_found = [len(list(self.folder.glob(pattern))) for pattern in EXPORTS[name]]
        return self.metadata["exports"].get(name) == count and min(num_found) >= num_files

    def export(self, pipeline: "SamplingPipeline | None" = None) -> None:
        """Write the missing exports, and record them in run.json.

        Args:
            pipeline: for the denoising strip; None: it is built if a strip is missing.

        Raises:
            UserError: a shard is damaged, or a file cannot be written.
        """
        from sagl.sampling.exports import npz_name, write_grid, write_images, write_npz, write_strip

        folder, count = self.folder, count_images(self.folder)
        for name in self.missing_exports():
            if name == "grid":
                write_grid(folder, folder / "grid.png")
            elif name == "images":
                write_images(folder, folder / "images")
            elif name == "npz":
                for older in folder.glob("samples_*.npz"):
                    older.unlink()
                write_npz(folder, folder / npz_name(folder, count), count)
            else:
                pipeline = pipeline or self.build_pipeline(select_device(self.config.devices))
                write_strip(pipeline, self.config.samples, folder)
            self.metadata["exports"][name] = count
            write_run_json(folder, self.metadata)


# ------------------------------------------------------------------------------------------------- checks


def _check_network(config: SampleConfig) -> tuple[UNetSettings, DiffusionSettings, Path]:
    """Check a configuration against its network; return the settings of network and process, and the weight file.

    Raises:
        UserError: they are incompatible, or the file cannot be had.
    """
    network, diffusion = config.source.read_settings()
    check_compatible(network, diffusion, config.guidances)
    check_labels(config.samples, network, config.guidances)
    check_guidance_files(config.guidances, network, diffusion)
    respacing, num_timesteps = config.sampler.respacing, diffusion.num_timesteps
    require(
        respaced_timesteps(respacing, num_timesteps)[-1] > 0 or num_timesteps == 1,
        f"`respacing` must have a timestep above 0, because a chain begins with noise, got {respacing!r}. Give at "
        "least 2 steps.",
    )
    return network, diffusion, config.source.find_file()
