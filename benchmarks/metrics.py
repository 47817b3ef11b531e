"""Time and memory of metrics of given features, compared with torchmetrics and torch-fidelity.

python benchmarks/metrics.py --report benchmarks/reports/metrics.md

Every measurement runs in a process of its own, the libraries in turn, on the same random features. If a library has no
public function of features, its internal function is called.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from sagl.metrics import frechet
from sagl.metrics.kid import kernel_distance
from sagl.metrics.precision_recall import precision_recall

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.speed import machine

Pair = tuple[Tensor, Tensor]


def features(count: int, width: int) -> Pair:
    """Return two float32 sets of non-negative, correlated features with a few strong directions."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 * torch.linspace(2, 0.05, width)[:, None]
    fake, real = (torch.randn(count, width, generator=generator) @ mixing for _ in range(2))
    return (fake + 0.1).relu(), real.relu()


def _sagl_frechet(fake: Tensor, real: Tensor) -> float:
    return frechet.frechet_distance(frechet.statistics(fake), frechet.statistics(real))


def _fidelity_frechet(fake: Tensor, real: Tensor) -> float:
    stats = [fid_features_to_statistics(part) for part in (fake, real)]
    return float(fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"])


SHAPE: Any = (2048,)
"""Shape of features, where torchmetrics expects that of images."""


class Identity(torch.nn.Module):
    """Feature extractor that returns its input."""

    num_features = 2048

    def forward(self, x: Tensor) -> Tensor:
        """Return the features."""
        return x


def _torchmetrics_frechet(fake: Tensor, real: Tensor) -> float:
    metric = FrechetInceptionDistance(feature=Identity(), normalize=True, input_img_size=SHAPE).set_dtype(torch.float64)
    for part, is_real in ((fake, False), (real, True)):
        for batch in part.split(100):
            metric.update(batch.double(), real=is_real)
    return float(metric.compute())


def _sagl_precision(fake: Tensor, real: Tensor) -> list[float]:
    return list(precision_recall(fake, real))


def _fidelity_precision(fake: Tensor, real: Tensor, *, save_cpu_ram: bool = False) -> list[float]:
    results = prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=save_cpu_ram, verbose=False
    )
    return [results["precision"], results["recall"]]


def _fidelity_precision_save_ram(fake: Tensor, real: Tensor) -> list[float]:
    return _fidelity_precision(fake, real, save_cpu_ram=True)


def _sagl_kernel(fake: Tensor, real: Tensor) -> float:
    return kernel_distance(fake, real).mean


def _fidelity_kernel(fake: Tensor, real: Tensor) -> float:
    return float(kid_features_to_metric(fake, real, verbose=False)["kernel_inception_distance_mean"])


def _torchmetrics_kernel(fake: Tensor, real: Tensor) -> float:
    metric = KernelInceptionDistance(feature=Identity(), subset_size=1000, normalize=True)
    metric.update(fake, real=False)
    metric.update(real, real=True)
    return float(metric.compute()[0])


Measure = Callable[[Tensor, Tensor], object]
COMPARISONS: dict[str, dict[str, Measure]] = {
    "Fréchet distance": {
        "sagl": _sagl_frechet,
        "torchmetrics": _torchmetrics_frechet,
        "torch-fidelity": _fidelity_frechet,
    },
    "precision and recall": {
        "sagl": _sagl_precision,
        "torch-fidelity": _fidelity_precision,
        "torch-fidelity, save_cpu_ram": _fidelity_precision_save_ram,
    },
    "kernel distance": {"sagl": _sagl_kernel, "torchmetrics": _torchmetrics_kernel, "torch-fidelity": _fidelity_kernel},
}


def measure(name: str, side: str, count: int) -> dict[str, object]:
    """Measure seconds, additional memory and value of one library in this process."""
    fake, real = features(count, 2048)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    value = COMPARISONS[name][side](fake, real)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "megabytes": (peak - before) * 1024 / 1e6, "value": value}


def table(name: str, count: int, rounds: int) -> list[str]:
    """Measure all libraries in turn, each round in new processes, and return a Markdown table."""
    results: dict[str, list[dict[str, object]]] = {side: [] for side in COMPARISONS[name]}
    for _ in range(rounds):
        for side in results:
            command = [sys.executable, __file__, "--one", name, side, "--count", str(count)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[side].append(json.loads(done.stdout))
            print(name, side, results[side][-1], flush=True)
    lines = ["", f"## {name.capitalize()}, {count:,} × 2048 from {count:,} × 2048", ""]
    lines += ["| side | seconds: median (least … most) | of sagl's | memory beside the features | value |"]
    lines += ["|---|---|---|---|---|"]
    own = statistics.median(float(str(one["seconds"])) for one in results["sagl"])
    for side, ones in results.items():
        seconds = [float(str(one["seconds"])) for one in ones]
        lines.append(
            f"| {side} | {statistics.median(seconds):.2f} ({min(seconds):.2f} … {max(seconds):.2f}) | "
            f"{statistics.median(seconds) / own:.2f} | {max(float(str(one['megabytes'])) for one in ones):.0f} MB | "
            f"{ones[0]['value']} |"
        )
    return lines


def main() -> None:
    """Measure one library, or all in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="samples of each set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(measure(a.one[0], a.one[1], a.count)))
        return
    lines = ["# Metrics", "", *machine(), f"- `python benchmarks/metrics.py {' '.join(sys.argv[1:])}`"]
    for name in COMPARISONS:
        lines += table(name, a.count, a.rounds)
    if a.report:
        a.report.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
