"""Speed of sagl compared with the public code, measured on this machine in one run.

    python benchmarks/speed.py --reference_adm ../guided-diffusion --reference_sag ../Self-Attention-Guidance \
        --report benchmarks/reports/speed.md

The sides of a comparison run in separate processes and take turns, one unit of work at a time, so that other load on
the machine affects all of them alike. Sides whose checkout is missing are left out.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # where sagl is not installed

from benchmarks.peak import convolution_peaks, forward_flops  # noqa: E402
from benchmarks.worker import NETWORKS, Side  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Sides that do the same unit of work. Times are relative to the first side."""

    title: str
    sides: Mapping[str, Side]
    bars: Mapping[str, float]
    """Largest allowed ratio to the first side's time, by side."""
    same_to: float | None = None
    """Largest allowed relative difference between the results of the first two sides."""


def ours(work: str, network: str, batch_size: int, precision: str = "float32") -> Side:
    """Return a side that runs sagl."""
    return Side(code="ours", work=work, network=network, batch_size=batch_size, precision=precision)


def comparisons(adm: str | None, sag: str | None) -> Iterator[tuple[str, Comparison]]:
    """Yield short names and comparisons; those whose checkout is missing are left out."""
    if sag:
        for batch_size in (1, 4):
            yield (
                f"lsun_sag_{batch_size}",
                _compare_with_sag(sag, "lsun", batch_size, {"float32": 1 / 2.2, "bfloat16": 1 / 6}),
            )
        yield "bundled_sag_64", _compare_with_sag(sag, "bundled", 64, {"float32": 1 / 1.5, "bfloat16": 1 / 2.5})
    if adm:  # two networks in training are what fits into memory at one time
        for precision, bar in (("float32", 1 / 1.3), ("bfloat16", 1 / 4)):
            yield f"adm64_training_8_{precision}", _compare_training_with_adm(adm, precision, bar)
    for network, batch_size in (("lsun", 1), ("bundled", 64)):
        yield f"{network}_guided", _compare_with_unguided(network, batch_size)


def _compare_with_sag(folder: str, network: str, batch_size: int, bars: Mapping[str, float]) -> Comparison:
    public = Side(code="sag", work="guided", network=network, batch_size=batch_size, folder=folder)
    sagl = {f"ours, {precision}": ours("guided", network, batch_size, precision) for precision in bars}
    return Comparison(
        title=f"SAG step, {network} network, batch {batch_size}",
        sides={"public SAG code, float32": public, **sagl},
        bars={f"ours, {precision}": bar for precision, bar in bars.items()},
        same_to=1e-3,
    )


def _compare_training_with_adm(folder: str, precision: str, bar: float) -> Comparison:
    public = Side(code="adm", work="training", network="adm64", batch_size=8, folder=folder)
    return Comparison(
        title=f"training step, 64x64 ADM, batch 8, {precision}",
        sides={"guided-diffusion, float32": public, f"ours, {precision}": ours("training", "adm64", 8, precision)},
        bars={f"ours, {precision}": bar},
    )


def _compare_with_unguided(network: str, batch_size: int) -> Comparison:
    return Comparison(
        title=f"SAG step against an unguided step, {network} network, batch {batch_size}, float32",
        sides={work: ours(work, network, batch_size) for work in ("unguided", "guided")},
        bars={"guided": 2.03},
    )


# ------------------------------------------------------------------------------------------------------ running


class Process:
    """A worker process, which answers each line with one line."""

    def __init__(self, side: Side) -> None:
        """Start the process, which builds its network and runs one unit for warm-up."""
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(side))]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self) -> None:
        """Wait until the warm-up has ended."""
        assert self._read_line() == "ready", "a worker did not start"

    def unit(self) -> dict[str, float]:
        """Run one unit, and return its cost."""
        return self.ask("unit")

    def ask(self, line: str) -> dict[str, float]:
        """Send a line, and return the answer."""
        self.send(line)
        return self.answer()

    def send(self, line: str) -> None:
        """Send a line, and do not wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, float]:
        """Wait for the answer to a line, and return it."""
        line = self._read_line()
        if not line:
            raise SystemExit("a worker ended before its work was done; is there memory enough for all sides?")
        return dict(json.loads(line))

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()


@contextmanager
def running(sides: Mapping[str, Side]) -> Iterator[dict[str, Process]]:
    """Start a process for each side; they warm up one after the other."""
    with ExitStack() as stack:
        processes = {}
        for name, side in sides.items():
            processes[name] = Process(side)
            stack.callback(processes[name].stop)
            processes[name].ready()
        yield processes


def run(comparison: Comparison, rounds: int) -> dict[str, Any]:
    """Return the costs of every side in every round, and the difference between the results of the first two sides."""
    with running(comparison.sides) as processes:
        costs: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
        for _ in range(rounds):
            for name, process in processes.items():
                costs[name].append(process.unit())
        difference = _difference(list(processes.values())[:2]) if comparison.same_to else None
        live = {
            name: processes[name].ask("live")["live_bytes"] for name, side in comparison.sides.items() if _is_step(side)
        }
    flops = {name: flops_of(side) for name, side in comparison.sides.items()}
    bars = dict(comparison.bars)
    return {
        "title": comparison.title,
        "costs": costs,
        "bars": bars,
        "difference": difference,
        "live": live,
        "flops": flops,
    }


def _is_step(side: Side) -> bool:
    """Return whether a side is a sampling step of sagl, whose tensors are counted."""
    return side.code == "ours" and side.work in ("guided", "unguided")


def flops_of(side: Side) -> int:
    """Return the operations of a unit's network passes; a backward pass counts as two forward passes."""
    passes = {"guided": 2, "training": 3}.get(side.work, 1)
    return passes * forward_flops(NETWORKS[side.network], side.batch_size)


def _difference(pair: Sequence[Process]) -> float:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        results = []
        for k, process in enumerate(pair):
            process.ask(f"save {folder}/{k}.pt")
            results.append(torch.load(f"{folder}/{k}.pt", weights_only=True))
    first, second = results
    return float((first - second).abs().max() / first.abs().max())


# ------------------------------------------------------------------------------------------------------- report


def format_table(result: Mapping[str, Any]) -> list[str]:
    """Format a comparison as Markdown: medians, spread, ratios to the first side, page faults, peak memory."""
    lines = [
        "",
        f"## {result['title']}",
        "",
        "| side | seconds: median (min … max) | ratio | target | GFLOP/s | page faults | peak RSS | live tensors |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    first = next(iter(result["costs"]))
    for name, costs in result["costs"].items():
        seconds = [cost["seconds"] for cost in costs]
        ratios = [cost["seconds"] / other["seconds"] for cost, other in zip(costs, result["costs"][first], strict=True)]
        bar = result["bars"].get(name)
        lines.append(
            f"| {name} | {statistics.median(seconds):.3f} ({min(seconds):.3f} … {max(seconds):.3f}) | "
            f"{statistics.median(ratios):.3f} | {'' if bar is None else f'≤ {bar:.3f}'} | "
            f"{result['flops'][name] / statistics.median(seconds) / 1e9:.0f} | "
            f"{statistics.median(cost['faults'] for cost in costs):,.0f} | {costs[-1]['peak_bytes'] / 1e9:.2f} GB | "
            f"{_megabytes(result['live'].get(name))} |"
        )
    if {"guided", "unguided"} <= result["live"].keys():
        increase = result["live"]["guided"] / result["live"]["unguided"] - 1
        lines += [
            "",
            f"Live tensors without the weights, guided relative to unguided: {increase:+.2%} (target: ≤ +0.50%).",
        ]
    if result["difference"] is not None:
        lines += ["", f"Largest relative difference between the first two results: {result['difference']:.1e}."]
    return lines


def _megabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f} MB"


def machine() -> list[str]:
    """Return lines with the processor, the versions and the commit."""
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return [
        f"- processor: {names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        f"- torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}",
        f"- commit {commit.stdout.strip() or 'unknown'}",
    ]


def shares(rounds: int) -> list[str]:
    """Return the throughput of the LSUN network relative to the fastest convolution, and its profile."""
    flops = forward_flops(NETWORKS["lsun"], 1)
    lines = ["", "## Throughput relative to the fastest convolution, forward pass of the LSUN network, batch 1", ""]
    lines += [f"{flops / 1e12:.2f} TFLOP per forward pass.", ""]
    lines += ["| precision | peak | forward | fraction | target |", "|---|---|---|---|---|"]
    profiles = {}
    for precision, required in (("float32", 0.85), ("bfloat16", 0.65)):
        peak = convolution_peaks(precision)
        with running({precision: ours("forward", "lsun", 1, precision)}) as processes:
            seconds = min(processes[precision].unit()["seconds"] for _ in range(rounds))
            profiles[precision] = processes[precision].ask("profile")
        rate = flops / seconds
        lines.append(
            f"| {precision} | {peak / 1e9:.0f} GFLOP/s | {rate / 1e9:.0f} GFLOP/s | {rate / peak:.0%} "
            f"| ≥ {required:.0%} |"
        )
    for precision, profile in profiles.items():
        lines += ["", f"Time by operation, {precision}: " + _format_profile(profile)]
    return lines


def _format_profile(profile: Mapping[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('aten::')} {fraction:.1%}" for name, fraction in profile.items()) + "."


def two_processes(rounds: int) -> list[str]:
    """Compare two processes with one thread and half a batch each with one process of two threads."""
    sides = {"one process, two threads": replace(ours("guided", "bundled", 64), threads=2)}
    sides |= {f"half {i}": replace(ours("guided", "bundled", 32), threads=1) for i in (1, 2)}
    one, two = [], []
    with running(sides) as processes:
        single, *halves = processes.values()
        for _ in range(rounds):
            one.append(single.unit()["seconds"])
            start = time.perf_counter()
            for half in halves:
                half.send("unit")
            for half in halves:
                half.answer()
            two.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(one, two, strict=True)]
    return [
        "",
        "## Two processes of one thread and one process of two, SAG step of 64 images, bundled network, float32",
        "",
        "| one process | two processes | throughput: median (min … max) | target |",
        "|---|---|---|---|",
        f"| {statistics.median(one):.3f} s | {statistics.median(two):.3f} s | "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f}) | ≥ 0.950 |",
    ]


def main() -> None:
    """Run the selected comparisons, and print or write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--reference_adm", "--reference-adm", type=_absolute, help="checkout of openai/guided-diffusion"
    )
    parser.add_argument("--reference_sag", "--reference-sag", type=_absolute, help="checkout of the public SAG code")
    parser.add_argument("--only", nargs="*", help="names of comparisons, share, two_processes; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", type=Path, help="a Markdown file to write")
    a = parser.parse_args()
    command = "python benchmarks/speed.py " + " ".join(sys.argv[1:])
    lines = ["# Speed", "", *machine(), f"- `{command}`"]
    sides = dict(comparisons(a.reference_adm, a.reference_sag))
    extras = {"share": shares, "two_processes": two_processes}
    names = [*sides, *extras] if a.only is None else a.only
    if unknown := set(names) - {*sides, *extras}:
        parser.error(f"--only takes {', '.join((*sides, *extras))}, got {', '.join(sorted(unknown))}")
    for name in names:
        if name in sides:
            lines += format_table(run(sides[name], a.rounds))
            print(*lines[-4:], sep="\n", flush=True)
        else:
            lines += extras[name](a.rounds)
    if a.report:
        a.report.parent.mkdir(parents=True, exist_ok=True)
        a.report.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _absolute(folder: str) -> str:
    """Return an absolute path; workers run in another folder."""
    return str(Path(folder).resolve())


if __name__ == "__main__":
    main()
