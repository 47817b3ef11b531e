"""How fast pictures reach training: an LMDB in LSUN's layout through `LSUNData`, beside decoding alone with Pillow.

    python benchmarks/loading.py --pictures 10000 --rounds 3 --report benchmarks/reports/loading.md

Made pictures, 256x256 JPEGs of the size of LSUN's; both sides have a process a core. Decoding alone reads the bytes and
makes arrays of them, and nothing else. The sides take turns. Memory is that of this process and its readers (PSS,
which counts shared pages once) at the end of every epoch.
"""

import argparse
import io
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image

from sagl.data.dataloader import ResumableDataLoader
from sagl.data.lsun import LSUNData, LSUNImageSource
from sagl.utils.environment import available_cpus, disable_malloc_trim

DIFFERENT = 200
"""Different pictures; the database holds each many times, as bytes of its own."""


def picture(number: int) -> bytes:
    """A JPEG with the detail of a photograph: smooth shapes, edges and grain."""
    rng = np.random.default_rng(number)
    noise = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (9, 60))
    coarse, middle = (np.asarray(Image.fromarray(part).resize((256, 256))) for part in noise)
    pixels = 0.75 * coarse + 0.25 * middle + rng.normal(0, 11, (256, 256, 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=75)
    return file.getvalue()


def write(folder: Path, count: int) -> float:
    """A category's LMDB; returns the mean number of bytes of a picture."""
    different = [picture(number) for number in range(min(DIFFERENT, count))]
    environment = lmdb.open(str(folder), map_size=1 << 34)
    with environment.begin(write=True) as transaction:
        for i in range(count):
            transaction.put(f"{i:040x}".encode(), different[i % len(different)])
    environment.close()
    return sum(map(len, different)) / len(different)


def decode(folder: Path, places: range) -> int:
    """Read and decode some of the pictures; returns a sum, so that nothing is left undone."""
    source = LSUNImageSource(folder)
    return sum(int(np.asarray(Image.open(io.BytesIO(source.read_bytes(i))).convert("RGB"))[0, 0, 0]) for i in places)


def decoding_alone(folder: Path, count: int, processes: int) -> float:
    """Pictures a second."""
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(abs, range(processes)))  # the processes are there
        started = time.monotonic()
        list(pool.map(decode, [folder] * processes, [range(k, count, processes) for k in range(processes)]))
        return count / (time.monotonic() - started)


def one_epoch(loader: ResumableDataLoader) -> float:
    """Pictures a second, from the first batch on."""
    seen, started = 0, 0.0
    for images, _ in loader:
        started = started or time.monotonic()
        seen += len(images)
    return (seen - loader.settings.batch_size) / (time.monotonic() - started)


def megabytes() -> float:
    """PSS of this process and of those below it."""
    me = os.getpid()
    family = [
        me,
        *(int(p) for task in Path(f"/proc/{me}/task").iterdir() for p in (task / "children").read_text().split()),
    ]
    return sum(_pss(process) for process in family) / 1024


def _pss(process: int) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Measure, print and write the report."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pictures", type=int, default=10_000)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--epochs", type=int, default=3, help="of the measurement of memory")
    p.add_argument("--report", type=Path, default=None)
    a = p.parse_args()
    disable_malloc_trim()  # as sagl fit does, and so for both sides
    cores = available_cpus()
    with tempfile.TemporaryDirectory() as root:
        os.environ["SAGL_CACHE"] = root
        size = write(Path(root) / "cat", a.pictures)
        data = LSUNData(
            category="cat", root=root, batch_size=a.batch_size, num_validation=0, num_workers=cores, image_size=256
        )
        data.setup("fit")
        loader = data.train_dataloader()
        rounds = []
        for _ in range(a.rounds):
            rounds.append((decoding_alone(Path(root) / "cat", a.pictures, cores), one_epoch(loader)))
            print("decoding alone {:.0f} pictures/s, through the loader {:.0f}".format(*rounds[-1]), flush=True)
        memory = []
        for _ in range(a.epochs):
            one_epoch(loader)
            memory.append(megabytes())
    lines = report(a, cores, size, rounds, memory)
    print("\n".join(lines))
    if a.report:
        a.report.parent.mkdir(parents=True, exist_ok=True)
        a.report.write_text("\n".join(lines) + "\n")


def report(
    a: argparse.Namespace, cores: int, size: float, rounds: list[tuple[float, float]], memory: list[float]
) -> list[str]:
    """Markdown."""
    ratios = sorted(loader / alone for alone, loader in rounds)
    return [
        "# Pictures to training",
        f"{a.pictures} JPEGs of 256x256, {size / 1e3:.1f} kB each, in an LMDB; {cores} cores, a process each, "
        f"batches of {a.batch_size}; {platform.processor() or platform.machine()}, Python {platform.python_version()}.",
        f"`python benchmarks/loading.py --pictures {a.pictures} --batch_size {a.batch_size} --rounds {a.rounds}`",
        "",
        "| round | decoding alone, pictures/s | through the loader, pictures/s | ratio |",
        "|---|---|---|---|",
        *(f"| {n + 1} | {x:.0f} | {y:.0f} | {y / x:.3f} |" for n, (x, y) in enumerate(rounds)),
        "",
        f"Median ratio {ratios[len(ratios) // 2]:.3f}. Memory of all processes after each further epoch: "
        + ", ".join(f"{megabyte:.0f} MB" for megabyte in memory)
        + ".",
    ]


if __name__ == "__main__":
    main()
