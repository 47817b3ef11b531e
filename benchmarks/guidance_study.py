"""Fréchet distance over guidance settings at equal seeds: which site, blur, scale and interval help a network.

    python benchmarks/guidance_study.py study.jsonl --num_samples 1000 --sampler ddpm --respacing ddim20

Each line of the output file is one measured setting; settings that are already in it are not measured again, so a
study that was stopped goes on. The unguided run is one of them and is shared by all.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sagl.data.fashion_mnist import PaddedFashionMNIST, fetch
from sagl.data.pixels import to_uint8
from sagl.diffusion.schedule import make_schedule
from sagl.machine import keep_freed_memory
from sagl.metrics.features import EXTRACTORS, features_of
from sagl.metrics.frechet import frechet_distance, statistics
from sagl.metrics.reference import cached_statistics
from sagl.models.checkpoints import build_network, read_network
from sagl.models.zoo import EMBEDDED
from sagl.recipe import collect, labels_of, prepare
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.paths import cache_folder, sha256
from sagl.settings.sampling import ChainSettings, RunSettings, micro_batches

EXTRACTOR = "effnet_lite0_64"


def grid(a: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings to measure, the unguided one first."""
    keys = ("scale", "site", "blur_sigma", "interval")
    values = product(a.scales, a.sites, a.blur_sigmas, [tuple(map(float, i.split("-"))) for i in a.intervals])
    return [{"scale": 0.0}, *(dict(zip(keys, value, strict=True)) for value in values)]


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
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the network's weights")
    a = p.parse_args()
    keep_freed_memory()
    a.study.parent.mkdir(parents=True, exist_ok=True)

    file = read_network(a.checkpoint)
    network = build_network(file).to(getattr(torch, a.dtype))
    chain = ChainSettings(sampler=a.sampler, respacing=a.respacing)
    run = RunSettings(num_samples=a.num_samples, first_id=a.first_id, batch_size=a.batch_size, labels="balanced")
    extract = EXTRACTORS[EXTRACTOR]()
    fetch(cache_folder())
    reference = cached_statistics(
        cache_folder() / "statistics" / f"fashion_mnist_test-{EXTRACTOR}.npz",
        lambda: features_of(PaddedFashionMNIST(cache_folder(), train=False).images, extract),
    )
    todo = list(pending(a, chain, run))
    steps = make_schedule(file.diffusion, a.respacing).num_steps
    passes = steps * a.num_samples * sum(2 if setting["scale"] else 1 for _, setting in todo)
    print(f"{len(todo)} settings to measure, at most {passes} network evaluations.")
    for key, setting in todo:
        started = time.monotonic()
        recipe = prepare(network, file.diffusion, chain, SelfAttentionGuidance(**setting))
        with torch.inference_mode():
            finals = (collect(recipe.chain(run.seed, i, labels_of(run, i, network)))[0] for i in micro_batches(run))
            images = torch.cat([to_uint8(x) for x in finals])
        distance = frechet_distance(statistics(features_of(images[: a.num_samples], extract)), reference)
        line = {"key": key, "distance": round(distance, 2), "nfe": recipe.nfe}
        line["seconds"] = round(time.monotonic() - started, 1)
        with a.study.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(json.dumps({"distance": line["distance"], "seconds": line["seconds"], **setting}), flush=True)
    for line in sorted(measured(a.study).values(), key=lambda line: line["distance"]):
        print(
            line["distance"], line["key"]["sag"], line["key"]["run"]["num_samples"], line["key"]["chain"]["respacing"]
        )


def pending(a: argparse.Namespace, chain: ChainSettings, run: RunSettings) -> Iterator[tuple[dict[str, Any], Any]]:
    """Settings that the study does not hold yet, with the key they are kept under."""
    done = measured(a.study)
    for setting in grid(a):
        key = {
            "checkpoint": sha256(a.checkpoint),
            "dtype": a.dtype,
            "chain": asdict(chain),
            "run": asdict(run),
            "sag": setting,
        }
        if json.dumps(json.loads(json.dumps(key)), sort_keys=True) not in done:
            yield key, setting


if __name__ == "__main__":
    main()
