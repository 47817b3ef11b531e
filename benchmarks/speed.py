"""How fast sagl is beside the public code, on this machine, in one run.

    python benchmarks/speed.py --reference_adm ../guided-diffusion --reference_sag ../Self-Attention-Guidance \
        --report benchmarks/reports/speed.md

Every comparison runs its sides in processes of their own that take turns, unit by unit, so that what else the
machine does falls on all of them. Without the checkouts the sides that need them are left out.
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
    """Sides that do the same unit of work; the first is what the others are measured against."""

    title: str
    sides: Mapping[str, Side]
    bars: Mapping[str, float]
    """Largest ratio to the first side's time that is asked for, by side."""
    same_to: float | None = None
    """Largest relative difference of the second side's result from the first's."""


def ours(work: str, network: str, batch_size: int, precision: str = "float32") -> Side:
    """A side of this package."""
    return Side(code="ours", work=work, network=network, batch_size=batch_size, precision=precision)


def comparisons(adm: str | None, sag: str | None) -> Iterator[tuple[str, Comparison]]:
    """All, by short names; those whose checkout is missing are left out."""
    if sag:
        for batch_size in (1, 4):
            yield (
                f"lsun_sag_{batch_size}",
                _beside_sag(sag, "lsun", batch_size, {"float32": 1 / 2.2, "bfloat16": 1 / 6}),
            )
        yield "bundled_sag_64", _beside_sag(sag, "bundled", 64, {"float32": 1 / 1.5, "bfloat16": 1 / 2.5})
    if adm:  # two networks in training are what fits into memory at one time
        for precision, bar in (("float32", 1 / 1.3), ("bfloat16", 1 / 4)):
            yield f"adm64_training_8_{precision}", _training_beside_adm(adm, precision, bar)
    for network, batch_size in (("lsun", 1), ("bundled", 64)):
        yield f"{network}_guided", _against_unguided(network, batch_size)


def _beside_sag(folder: str, network: str, batch_size: int, bars: Mapping[str, float]) -> Comparison:
    theirs = Side(code="sag", work="guided", network=network, batch_size=batch_size, folder=folder)
    mine = {f"ours, {precision}": ours("guided", network, batch_size, precision) for precision in bars}
    return Comparison(
        title=f"SAG step, {network} network, batch {batch_size}",
        sides={"public SAG code, float32": theirs, **mine},
        bars={f"ours, {precision}": bar for precision, bar in bars.items()},
        same_to=1e-3,
    )


def _training_beside_adm(folder: str, precision: str, bar: float) -> Comparison:
    theirs = Side(code="adm", work="training", network="adm64", batch_size=8, folder=folder)
    return Comparison(
        title=f"training step, 64x64 ADM, batch 8, {precision}",
        sides={"guided-diffusion, float32": theirs, f"ours, {precision}": ours("training", "adm64", 8, precision)},
        bars={f"ours, {precision}": bar},
    )


def _against_unguided(network: str, batch_size: int) -> Comparison:
    return Comparison(
        title=f"SAG step against an unguided step, {network} network, batch {batch_size}, float32",
        sides={work: ours(work, network, batch_size) for work in ("unguided", "guided")},
        bars={"guided": 2.03},
    )


# ------------------------------------------------------------------------------------------------------ running


class Process:
    """A worker, spoken to line by line."""

    def __init__(self, side: Side) -> None:
        """Start it; it builds its network and does one unit unmeasured."""
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(side))]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self) -> None:
        """Wait until it is."""
        assert self._answer() == "ready", "a worker did not start"

    def unit(self) -> dict[str, float]:
        """Do one, and say what it cost."""
        return self.ask("unit")

    def ask(self, line: str) -> dict[str, float]:
        """An answer for a line."""
        self.send(line)
        return self.answer()

    def send(self, line: str) -> None:
        """Have it begin."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, float]:
        """What it says when it is done."""
        said = self._answer()
        if not said:
            raise SystemExit("a worker ended before its work was done; is there memory enough for all sides?")
        return dict(json.loads(said))

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@contextmanager
def running(sides: Mapping[str, Side]) -> Iterator[dict[str, Process]]:
    """A process for each side, warmed up one after the other."""
    with ExitStack() as stack:
        processes = {}
        for name, side in sides.items():
            processes[name] = Process(side)
            stack.callback(processes[name].stop)
            processes[name].ready()
        yield processes


def run(comparison: Comparison, rounds: int) -> dict[str, Any]:
    """Seconds of every side in every round, and how far the second's result is from the first's."""
    with running(comparison.sides) as processes:
        costs: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
        for _ in range(rounds):
            for name, process in processes.items():
                costs[name].append(process.unit())
        differs = _difference(list(processes.values())[:2]) if comparison.same_to else None
        live = {
            name: processes[name].ask("live")["live_bytes"] for name, side in comparison.sides.items() if _steps(side)
        }
    flops = {name: flops_of(side) for name, side in comparison.sides.items()}
    bars = dict(comparison.bars)
    return {
        "title": comparison.title,
        "costs": costs,
        "bars": bars,
        "difference": differs,
        "live": live,
        "flops": flops,
    }


def _steps(side: Side) -> bool:
    """Whether it is a step of ours, whose tensors are counted."""
    return side.code == "ours" and side.work in ("guided", "unguided")


def flops_of(side: Side) -> int:
    """Of a unit's passes through the network; a backward pass counts twice a forward."""
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


def table_of(result: Mapping[str, Any]) -> list[str]:
    """A comparison as Markdown: medians, spread, ratios to the first side, faults, peak."""
    lines = [
        "",
        f"## {result['title']}",
        "",
        "| side | seconds: median (least … most) | ratio | asked | GFLOP/s | page faults | peak RSS | live tensors |",
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
        more = result["live"]["guided"] / result["live"]["unguided"] - 1
        lines += ["", f"Live tensors beside the weights, guided against unguided: {more:+.2%} (asked ≤ +0.50%)."]
    if result["difference"] is not None:
        lines += ["", f"Largest relative difference of the second side's result: {result['difference']:.1e}."]
    return lines


def _megabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f} MB"


def machine() -> list[str]:
    """Processor, versions, commit."""
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
    """Our LSUN-size forward as a share of the fastest convolution that this machine was seen to do, and its profile."""
    flops = forward_flops(NETWORKS["lsun"], 1)
    lines = ["", "## Share of the machine's convolution peak, LSUN-size forward, batch 1", ""]
    lines += [f"{flops / 1e12:.2f} TFLOP a forward.", ""]
    lines += ["| precision | peak | forward | share | asked |", "|---|---|---|---|---|"]
    profiles = {}
    for precision, asked in (("float32", 0.85), ("bfloat16", 0.65)):
        peak = convolution_peaks(precision)
        with running({precision: ours("forward", "lsun", 1, precision)}) as processes:
            seconds = min(processes[precision].unit()["seconds"] for _ in range(rounds))
            profiles[precision] = processes[precision].ask("profile")
        rate = flops / seconds
        lines.append(
            f"| {precision} | {peak / 1e9:.0f} GFLOP/s | {rate / 1e9:.0f} GFLOP/s | {rate / peak:.0%} | ≥ {asked:.0%} |"
        )
    for precision, profile in profiles.items():
        lines += ["", f"Where its time goes, {precision}: " + _listed(profile)]
    return lines


def _listed(profile: Mapping[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('aten::')} {share:.1%}" for name, share in profile.items()) + "."


def two_processes(rounds: int) -> list[str]:
    """Two processes of one thread with half a batch each, at the same time, against one of two threads."""
    sides = {"one process, two threads": replace(ours("guided", "bundled", 64), threads=2)}
    sides |= {f"half {i}": replace(ours("guided", "bundled", 32), threads=1) for i in (1, 2)}
    one, two = [], []
    with running(sides) as processes:
        whole, *halves = processes.values()
        for _ in range(rounds):
            one.append(whole.unit()["seconds"])
            started = time.perf_counter()
            for half in halves:
                half.send("unit")
            for half in halves:
                half.answer()
            two.append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(one, two, strict=True)]
    return [
        "",
        "## Two processes of one thread against one of two, SAG step of 64 images, bundled network, float32",
        "",
        "| one process | two processes | throughput: median (least … most) | asked |",
        "|---|---|---|---|",
        f"| {statistics.median(one):.3f} s | {statistics.median(two):.3f} s | "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f}) | ≥ 0.950 |",
    ]


def main() -> None:
    """Run what was asked for and print or write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--reference_adm", "--reference-adm", type=_absolute, help="checkout of openai/guided-diffusion"
    )
    parser.add_argument("--reference_sag", "--reference-sag", type=_absolute, help="checkout of the public SAG code")
    parser.add_argument("--only", nargs="*", help="names of comparisons, share, two_processes; all unless told")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", type=Path, help="a Markdown file to write")
    a = parser.parse_args()
    command = "python benchmarks/speed.py " + " ".join(sys.argv[1:])
    lines = ["# Speed", "", *machine(), f"- `{command}`"]
    sides = dict(comparisons(a.reference_adm, a.reference_sag))
    others = {"share": shares, "two_processes": two_processes}
    names = [*sides, *others] if a.only is None else a.only
    if unknown := set(names) - {*sides, *others}:
        parser.error(f"--only takes {', '.join((*sides, *others))}, got {', '.join(sorted(unknown))}")
    for name in names:
        if name in sides:
            lines += table_of(run(sides[name], a.rounds))
            print(*lines[-4:], sep="\n", flush=True)
        else:
            lines += others[name](a.rounds)
    if a.report:
        a.report.parent.mkdir(parents=True, exist_ok=True)
        a.report.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _absolute(folder: str) -> str:
    """A folder as the workers find it, who run elsewhere."""
    return str(Path(folder).resolve())


if __name__ == "__main__":
    main()
