"""Fréchet distance of many guidance settings at equal seeds, to find site, blur, scale and interval of a network.

    python benchmarks/guidance_study.py study.jsonl --num_samples 1000 --sampler ddpm --respacing ddim20

Each line of the output file is one setting. Settings that are in the file already are skipped, so that a study can be
resumed. Features are saved beside the file. Differences from the unguided run of the same network and from the first
setting are printed with a paired 95 % interval.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sagl.data.fashion_mnist import PaddedFashionMNIST, prepare_fashion_mnist
from sagl.metrics.bootstrap import paired_interval
from sagl.metrics.extractors import get_extractor
from sagl.metrics.features import extract_features
from sagl.metrics.frechet import FrechetReference, statistics
from sagl.models.adm import UNet
from sagl.models.checkpoints import build_network, cast_weights, read_checkpoint
from sagl.models.zoo import DEFAULT_CHECKPOINT
from sagl.sampling.pipeline import SamplingPipeline, build_pipeline, make_labels
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings, SamplerSettings, WeightPrecision, id_batches
from sagl.shapes import ImageUint8
from sagl.utils.environment import disable_malloc_trim
from sagl.utils.files import cache_folder, sha256
from sagl.utils.images import to_uint8

EXTRACTOR = "effnet_lite0_64"
PRECISIONS: dict[str, WeightPrecision] = {"float32": "32-true", "bfloat16": "bf16-true"}


@dataclass(frozen=True)
class Setting:
    """One run of the study."""

    checkpoint: Path
    dtype: str
    sag: dict[str, Any]
    key: dict[str, Any]
    """Everything that determines its images."""

    @property
    def name(self) -> str:
        """The key as text."""
        return json.dumps(self.key, sort_keys=True)

    @property
    def label(self) -> str:
        """Network and guidance as text."""
        return json.dumps({"network": self.checkpoint.stem, "dtype": self.dtype, **self.sag})

    def features(self, study: Path) -> Path:
        """Return the path of its features."""
        return study.with_suffix(".features") / f"{hashlib.sha256(self.name.encode()).hexdigest()[:16]}.npy"


def grid(a: argparse.Namespace, chain: SamplerSettings, samples: RunSettings) -> list[Setting]:
    """Return the settings, network by network, the unguided one first."""
    keys = ("scale", "site", "blur_sigma", "interval")
    values = product(a.scales, a.sites, a.blur_sigmas, [tuple(map(float, i.split("-"))) for i in a.intervals])
    of_sag = [{"scale": 0.0}, *(dict(zip(keys, value, strict=True)) for value in values)]
    settings = []
    for path in a.checkpoints:
        common = {"checkpoint": sha256(path), "chain": asdict(chain), "samples": asdict(samples)}
        for sag, dtype in product(of_sag, a.dtypes):
            key = json.loads(json.dumps({**common, "dtype": dtype, "sag": sag}))
            settings.append(Setting(checkpoint=path, dtype=dtype, sag=sag, key=key))
    return settings


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of the study by their settings."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {json.dumps(line["key"], sort_keys=True): line for line in lines}


def main() -> None:
    """Evaluate the missing settings, then print all."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", type=Path)
    p.add_argument("--checkpoints", type=Path, nargs="+", default=[DEFAULT_CHECKPOINT])
    p.add_argument("--num_samples", type=int, default=1000)
    p.add_argument("--first_id", type=int, default=0)
    p.add_argument("--batch_size", type=int, default=100)
    p.add_argument("--sampler", choices=["ddpm", "ddim"], default="ddpm")
    p.add_argument("--respacing", default="ddim20")
    p.add_argument("--scales", type=float, nargs="*", default=[0.1, 0.3])
    p.add_argument("--sites", nargs="+", default=["middle", "output.2", "output.5"])
    p.add_argument("--blur_sigmas", type=float, nargs="+", default=[1.0, 2.0])
    p.add_argument("--intervals", nargs="+", default=["0-1"])
    p.add_argument("--dtypes", choices=["float32", "bfloat16"], nargs="+", default=["float32"], help="of the weights")
    p.add_argument("--num_resamples", type=int, default=200, help="of the paired bootstrap; 0: no intervals")
    a = p.parse_args()
    disable_malloc_trim()
    a.study.parent.mkdir(parents=True, exist_ok=True)

    chain = SamplerSettings(sampler=a.sampler, respacing=a.respacing)
    samples = RunSettings(num_samples=a.num_samples, first_id=a.first_id, batch_size=a.batch_size, labels="balanced")
    extract = get_extractor(EXTRACTOR)(torch.device("cpu"))
    prepare_fashion_mnist(cache_folder())
    test_split = extract_features(PaddedFashionMNIST(cache_folder(), train=False).images, extract).pooled
    distance_to_test = FrechetReference(statistics(test_split))
    settings = grid(a, chain, samples)
    todo = [s for s in settings if s.name not in read_lines(a.study) or not s.features(a.study).exists()]
    pipelines = [pipeline_of(setting, chain) for setting in todo]
    passes = a.num_samples * sum(pipeline.nfe for pipeline in pipelines)
    print(f"{len(todo)} settings to measure, {passes} network evaluations.", flush=True)
    for setting, pipeline in zip(todo, pipelines, strict=True):
        start_time = time.monotonic()
        features = extract_features(sample_images(pipeline, samples)[: a.num_samples], extract).pooled
        save_features(features, setting.features(a.study))
        line = {"key": setting.key, "distance": round(distance_to_test(statistics(features)), 2), "nfe": pipeline.nfe}
        line["seconds"] = round(time.monotonic() - start_time, 1)
        with a.study.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(f"{line['distance']:8.2f}  {line['seconds']} s  {setting.label}", flush=True)
    report(a.study, settings, lambda features: distance_to_test(statistics(features)), a.num_resamples)


@cache
def load_network(checkpoint: Path, dtype: str) -> tuple[UNet, DiffusionSettings]:
    """Load a network in a precision, and its diffusion settings."""
    file = read_checkpoint(checkpoint)
    return cast_weights(build_network(file), PRECISIONS[dtype], torch.device("cpu")), file.diffusion


def pipeline_of(setting: Setting, chain: SamplerSettings) -> SamplingPipeline:
    """Return the pipeline of a setting."""
    network, diffusion = load_network(setting.checkpoint, setting.dtype)
    return build_pipeline(network, diffusion, chain, {"sag": SelfAttentionGuidance(**setting.sag)})


@torch.inference_mode()
def sample_images(pipeline: SamplingPipeline, samples: RunSettings) -> ImageUint8:
    """Sample all images of a run."""
    batches = (
        pipeline.sample(samples.seed, i, make_labels(samples, i, pipeline.network))[0] for i in id_batches(samples)
    )
    return torch.cat([to_uint8(x) for x in batches])


def report(study: Path, settings: list[Setting], distance: Callable[[Tensor], float], num_resamples: int) -> None:
    """Print all settings with their differences from the unguided run and from the first setting."""
    own = {(s.checkpoint, s.dtype): s for s in settings if not s.sag["scale"]}
    for setting in settings:
        line = read_lines(study)[setting.name]
        print(f"{line['distance']:8.2f}  {setting.label}")
        others = {"its unguided run": own[setting.checkpoint, setting.dtype], "the first": settings[0]}
        for what, other in others.items():
            if other is setting or not num_resamples or (what == "the first" and other is others["its unguided run"]):
                continue
            base, features = (torch.from_numpy(np.load(s.features(study))) for s in (other, setting))
            interval = paired_interval(base, features, distance, num_resamples=num_resamples)
            print("          from {}: {:+.2f} ({:+.2f} … {:+.2f})".format(what, *interval), end="")
            print(", {:+.2%} ({:+.2%} … {:+.2%})".format(*(end / distance(base) for end in interval)), flush=True)


def save_features(features: Tensor, path: Path) -> None:
    """Write features atomically."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, features.float().numpy())
    partial.replace(path)


if __name__ == "__main__":
    main()
