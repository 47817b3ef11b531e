"""Fréchet distance over guidance settings at equal seeds: which site, blur, scale and interval help a network.

    python benchmarks/guidance_study.py study.jsonl --num_samples 1000 --sampler ddpm --respacing ddim20

Each line of the output file is one measured setting; settings that are already in it are not measured again, so a
study that was stopped goes on. The unguided run is one of them and is shared by all. Features are kept beside the
file, and the differences from the first setting are given with a paired 95 % interval.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sagl.data.fashion_mnist import PaddedFashionMNIST, fetch
from sagl.data.pixels import to_uint8
from sagl.diffusion.schedule import make_schedule
from sagl.machine import keep_freed_memory
from sagl.metrics.bootstrap import paired_interval
from sagl.metrics.features import EXTRACTORS, features_of
from sagl.metrics.frechet import FrechetTo, statistics
from sagl.metrics.reference import cached_statistics
from sagl.models.checkpoints import as_weights, build_network, read_network
from sagl.models.zoo import EMBEDDED
from sagl.recipe import collect, labels_of, prepare
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.paths import cache_folder, sha256
from sagl.settings.sampling import ChainSettings, RunSettings, WeightPrecision, micro_batches

EXTRACTOR = "effnet_lite0_64"
PRECISIONS: dict[str, WeightPrecision] = {"float32": "32-true", "bfloat16": "bf16-true"}


def grid(a: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """The settings to measure, the unguided one first."""
    keys = ("scale", "site", "blur_sigma", "interval")
    values = product(a.scales, a.sites, a.blur_sigmas, [tuple(map(float, i.split("-"))) for i in a.intervals])
    settings = [{"scale": 0.0}, *(dict(zip(keys, value, strict=True)) for value in values)]
    return [(dtype, setting) for setting in settings for dtype in a.dtypes]


def measured(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of the study so far, by their settings."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {json.dumps(line["key"], sort_keys=True): line for line in lines}


def main() -> None:
    """Measure what is missing, then print all, best first."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", type=Path)
    p.add_argument("--checkpoint", type=Path, default=EMBEDDED)
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
    p.add_argument("--draws", type=int, default=200, help="of the paired bootstrap; 0: no intervals")
    a = p.parse_args()
    keep_freed_memory()
    a.study.parent.mkdir(parents=True, exist_ok=True)

    file = read_network(a.checkpoint)
    networks = {dtype: as_weights(build_network(file), PRECISIONS[dtype], torch.device("cpu")) for dtype in a.dtypes}
    chain = ChainSettings(sampler=a.sampler, respacing=a.respacing)
    run = RunSettings(num_samples=a.num_samples, first_id=a.first_id, batch_size=a.batch_size, labels="balanced")
    extract = EXTRACTORS[EXTRACTOR]()
    fetch(cache_folder())
    reference = cached_statistics(
        cache_folder() / "statistics" / f"fashion_mnist_test-{EXTRACTOR}.npz",
        lambda: features_of(PaddedFashionMNIST(cache_folder(), train=False).images, extract),
    )
    distance_to_test = FrechetTo(reference)
    keys = [key_of(a, chain, run, dtype, setting) for dtype, setting in grid(a)]
    todo = [key for key in keys if named(key) not in measured(a.study) or not features_path(a.study, key).exists()]
    steps = make_schedule(file.diffusion, a.respacing).num_steps
    passes = steps * a.num_samples * sum(2 if key["sag"]["scale"] else 1 for key in todo)
    print(f"{len(todo)} settings to measure, at most {passes} network evaluations.")
    for key in todo:
        started, network = time.monotonic(), networks[key["dtype"]]
        recipe = prepare(network, file.diffusion, chain, SelfAttentionGuidance(**key["sag"]))
        with torch.inference_mode():
            finals = (collect(recipe.chain(run.seed, i, labels_of(run, i, network)))[0] for i in micro_batches(run))
            images = torch.cat([to_uint8(x) for x in finals])
        features = features_of(images[: a.num_samples], extract)
        save_features(features, features_path(a.study, key))
        line = {"key": key, "distance": round(distance_to_test(statistics(features)), 2), "nfe": recipe.nfe}
        line["seconds"] = round(time.monotonic() - started, 1)
        with a.study.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(json.dumps({"distance": line["distance"], "seconds": line["seconds"], **shown(key)}), flush=True)
    report(a.study, keys, lambda features: distance_to_test(statistics(features)), a.draws)


def report(study: Path, keys: list[dict[str, Any]], distance: Callable[[Tensor], float], draws: int) -> None:
    """All settings asked for, and how far each is from the first."""
    first = torch.from_numpy(np.load(features_path(study, keys[0])))
    for key in keys:
        line = measured(study)[named(key)]
        print(f"{line['distance']:8.2f}  {json.dumps(shown(key))}", end="")
        if key is not keys[0] and draws:
            interval = paired_interval(
                first, torch.from_numpy(np.load(features_path(study, key))), distance, draws=draws
            )
            base = distance(first)
            print("  difference {:+.2f} ({:+.2f} … {:+.2f})".format(*interval), end="")
            print(", {:+.2%} ({:+.2%} … {:+.2%})".format(*(end / base for end in interval)), end="", flush=True)
        print()


def shown(key: dict[str, Any]) -> dict[str, Any]:
    """What sets a setting apart."""
    return {"dtype": key["dtype"], **key["sag"]}


def key_of(
    a: argparse.Namespace, chain: ChainSettings, run: RunSettings, dtype: str, setting: dict[str, Any]
) -> dict[str, Any]:
    """All that decides a setting's images."""
    key = {"checkpoint": sha256(a.checkpoint), "dtype": dtype, "chain": asdict(chain), "run": asdict(run)}
    return dict(json.loads(json.dumps(key | {"sag": setting})))


def named(key: dict[str, Any]) -> str:
    """A key as text."""
    return json.dumps(key, sort_keys=True)


def features_path(study: Path, key: dict[str, Any]) -> Path:
    """Where a setting's features are kept."""
    return study.with_suffix(".features") / f"{hashlib.sha256(named(key).encode()).hexdigest()[:16]}.npy"


def save_features(features: Tensor, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, features.float().numpy())
    partial.replace(path)


if __name__ == "__main__":
    main()
