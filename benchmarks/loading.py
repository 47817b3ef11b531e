"""Loading speed: an LMDB in LSUN's layout through `LSUNData`, compared with decoding alone with Pillow.

    python benchmarks/loading.py --num_images 10000 --rounds 3 --report benchmarks/reports/loading.md

The images are synthetic 256x256 JPEGs of the size of LSUN's. Both sides use one process per core and take turns;
decoding alone reads the bytes and converts them to arrays. Memory is the PSS (which counts shared pages once) of this
process and its workers at the end of each epoch.
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

NUM_DISTINCT = 200
"""Distinct images; the database holds several copies of each."""


def synthetic_jpeg(seed: int) -> bytes:
    """Return a JPEG with the detail of a photograph: smooth shapes, edges and grain."""
    rng = np.random.default_rng(seed)
    noise = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (9, 60))
    coarse, middle = (np.asarray(Image.fromarray(part).resize((256, 256))) for part in noise)
    pixels = 0.75 * coarse + 0.25 * middle + rng.normal(0, 11, (256, 256, 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=75)
    return file.getvalue()


def write_lmdb(folder: Path, count: int) -> float:
    """Write the LMDB of a category; return the mean number of bytes per image."""
    files = [synthetic_jpeg(seed) for seed in range(min(NUM_DISTINCT, count))]
    environment = lmdb.open(str(folder), map_size=1 << 34)
    with environment.begin(write=True) as transaction:
        for i in range(count):
            transaction.put(f"{i:040x}".encode(), files[i % len(files)])
    environment.close()
    return sum(map(len, files)) / len(files)


def decode(folder: Path, indices: range) -> int:
    """Read and decode some images; return a sum of pixels, so that all decoding is done."""
    source = LSUNImageSource(folder)
    return sum(int(np.asarray(Image.open(io.BytesIO(source.read_bytes(i))).convert("RGB"))[0, 0, 0]) for i in indices)


def decoding_speed(folder: Path, count: int, processes: int) -> float:
    """Return images per second."""
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(abs, range(processes)))  # start the processes
        started = time.monotonic()
        list(pool.map(decode, [folder] * processes, [range(k, count, processes) for k in range(processes)]))
        return count / (time.monotonic() - started)


def loading_speed(loader: ResumableDataLoader) -> float:
    """Run one epoch; return images per second after the first batch."""
    num_images, started = 0, 0.0
    for images, _ in loader:
        started = started or time.monotonic()
        num_images += len(images)
    return (num_images - loader.settings.batch_size) / (time.monotonic() - started)


def memory_megabytes() -> float:
    """Return the PSS of this process and its children."""
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return sum(_pss(process) for process in (os.getpid(), *children)) / 1024


def _pss(process: int) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Measure both speeds, print and write the report."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--num_images", type=int, default=10_000)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--epochs", type=int, default=3, help="epochs of the memory measurement")
    p.add_argument("--report", type=Path, default=None)
    a = p.parse_args()
    disable_malloc_trim()  # as sagl fit does
    cores = available_cpus()
    with tempfile.TemporaryDirectory() as root:
        os.environ["SAGL_CACHE"] = root
        size = write_lmdb(Path(root) / "cat", a.num_images)
        data = LSUNData(
            category="cat", root=root, batch_size=a.batch_size, num_validation=0, num_workers=cores, image_size=256
        )
        data.setup("fit")
        loader = data.train_dataloader()
        rounds = []
        for _ in range(a.rounds):
            rounds.append((decoding_speed(Path(root) / "cat", a.num_images, cores), loading_speed(loader)))
            print("decoding alone {:.0f} images/s, through the loader {:.0f}".format(*rounds[-1]), flush=True)
        memory = []
        for _ in range(a.epochs):
            loading_speed(loader)
            memory.append(memory_megabytes())
    lines = report(a, cores, size, rounds, memory)
    print("\n".join(lines))
    if a.report:
        a.report.parent.mkdir(parents=True, exist_ok=True)
        a.report.write_text("\n".join(lines) + "\n")


def report(
    a: argparse.Namespace, cores: int, size: float, rounds: list[tuple[float, float]], memory: list[float]
) -> list[str]:
    """Return the report in Markdown."""
    ratios = sorted(loader / alone for alone, loader in rounds)
    return [
        "# Loading speed",
        f"{a.num_images} JPEGs of 256x256, {size / 1e3:.1f} kB each, in an LMDB; {cores} cores, one process per core, "
        f"batches of {a.batch_size}; {platform.processor() or platform.machine()}, Python {platform.python_version()}.",
        f"`python benchmarks/loading.py --num_images {a.num_images} --batch_size {a.batch_size} --rounds {a.rounds}`",
        "",
        "| round | decoding alone, images/s | through the loader, images/s | ratio |",
        "|---|---|---|---|",
        *(f"| {n + 1} | {x:.0f} | {y:.0f} | {y / x:.3f} |" for n, (x, y) in enumerate(rounds)),
        "",
        f"Median ratio {ratios[len(ratios) // 2]:.3f}. Memory of all processes after each further epoch: "
        + ", ".join(f"{megabyte:.0f} MB" for megabyte in memory)
        + ".",
    ]


if __name__ == "__main__":
    main()
