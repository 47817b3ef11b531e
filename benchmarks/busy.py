"""Time `sagl sample` on a quiet machine and beside a busy program, for one or more source trees.

    python benchmarks/busy.py . ../sagl-before --rounds 3

Every round runs each tree once quiet and once beside a process with two spinning threads, in turn, so that changes of
the machine affect all alike. The last line of each tree's table gives the ratio of medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = ["sample", "--model", "fashion_mnist", "--num_samples", "8", "--respacing", "ddim10", "--sag.scale", "0.3"]
COMMAND += ["--progress", "off"]
SPIN = "while True: pass"
WAIT_SECONDS = 1.0
"""Time for the load to settle before a command starts."""


@contextmanager
def busy_program(num_threads: int) -> Iterator[None]:
    """Keep `num_threads` cores busy, by as many processes."""
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(num_threads)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds_of_command(tree: Path) -> float:
    """Run the command with the package of `tree` and return its wall time."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sagl.cli", *COMMAND, "--output", f"{folder}/run"]
        started = time.perf_counter()
        subprocess.run(command, cwd=tree, env=environment | {"PYTHONPATH": str(tree)}, check=True, capture_output=True)
        return time.perf_counter() - started


def main() -> None:
    """Measure all trees and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", type=lambda path: Path(path).resolve(), nargs="+", help="source trees to compare")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="busy threads of the other program")
    args = parser.parse_args()
    times: dict[Path, dict[str, list[float]]] = {tree: {"quiet": [], "busy": []} for tree in args.trees}
    for _ in range(args.rounds):
        for tree, seconds in times.items():
            for load, num_threads in (("quiet", 0), ("busy", args.threads)):
                with busy_program(num_threads):
                    time.sleep(WAIT_SECONDS)
                    seconds[load].append(seconds_of_command(tree))
    print("| tree | quiet, seconds | busy, seconds | ratio of medians |", "|---|---|---|---|", sep="\n")
    for tree, seconds in times.items():
        listed = {load: ", ".join(f"{value:.1f}" for value in values) for load, values in seconds.items()}
        ratio = statistics.median(seconds["busy"]) / statistics.median(seconds["quiet"])
        print(f"| {tree.name} | {listed['quiet']} | {listed['busy']} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
