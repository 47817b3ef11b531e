"""Damage every kind of file that sagl reads, and check that no damage changes a number without a word.

    python -m benchmarks.mutate_files [--count 500] [--seed 0] [--kind KIND …]

A mutation changes bytes, cuts, inserts, removes or swaps parts of one file. A command then reads the file, in a process
of its own. It must have the same result as with the whole file, or end in one line and exit code 2. Printed are the
outcomes by kind of file; each failure (another result, a traceback, a hang, a signal) is printed with the seed that
repeats it. The exit code is 1 if there is one. Configurations and tables of labels are written by hand: a change in
them is another request, so that only tracebacks, hangs and signals count.
"""

import argparse
import hashlib
import io
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from sagl import cli
from sagl.metrics.extractors import EXTRACTORS
from sagl.models.metadata import read_metadata
from tests.helpers.networks import GREY, grey_unet, write_grey_unet, write_training_checkpoint

SECONDS = 60
"""Time after which a command counts as hanging."""
SAMPLE = ["--respacing", "ddim2", "--batch_size", "2", "--trainer.precision", "32-true", "--progress", "off"]
EVALUATE = ["--reference", "r.npz", "--format", "json", "--progress", "off"]
Mutation = Callable[[bytearray, np.random.Generator], None]


# ------------------------------------------------------------------------------------------------------- files


def run(*arguments: str) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert cli.main(list(arguments)) == 0, arguments


def write_files(folder: Path) -> None:
    """Write one file of each kind, and everything that the commands need to read them."""
    os.chdir(folder)
    write_grey_unet(Path("net.safetensors"))  # type: ignore[no-untyped-call]
    write_training_checkpoint(Path("last.ckpt"))  # type: ignore[no-untyped-call]
    torch.save(dict(grey_unet().state_dict()), "net.pt")  # type: ignore[no-untyped-call]
    Path("net.yaml").write_text(yaml.safe_dump({"model": {"network": {k: _listed(v) for k, v in GREY.items()}}}))
    rng = np.random.default_rng(0)
    rows = ["file,label"]
    for index in range(12):
        name = f"{'abc'[index % 3]}/{index:03d}.png"
        (Path("images") / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(Path("images") / name)
        rows.append(f"{name},{index % 3}")
    Path("labels.csv").write_text("\n".join(rows) + "\n")
    with lmdb.open("lsun", map_size=1 << 20) as database, database.begin(write=True) as transaction:
        for path in sorted(Path("images").rglob("*.png")):
            transaction.put(path.stem.encode(), path.read_bytes())
    run("sample", "--checkpoint", "net.safetensors", "--num_samples", "4", "--output", "run", *SAMPLE)
    run("export", "run", "--npz", "images.npz")
    run("shard", "images", "--labels", "labels.csv", "--output", "shards", "--progress", "off")
    run("statistics", "images", "--output", "r.npz", "--progress", "off")
    run("evaluate", "run", *EVALUATE)
    for name in ("shards", "lsun"):
        run("evaluate", name, *EVALUATE)
    run("evaluate", "run", *EVALUATE[2:], "--reference", "images")


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------------------------------------- kinds


def weights_of(path: Path) -> str:
    """Return a digest of the weights and settings in a safetensors file."""
    digest = hashlib.sha256(json.dumps(read_metadata(path), sort_keys=True).encode())
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def bytes_of(path: Path) -> str:
    """Return a digest of a file, or of all files in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def converted(_: str) -> str:
    """Return a digest of the weights that `sagl convert` wrote."""
    return weights_of(Path("out.safetensors"))


def values_of(output: str) -> str:
    """Return the values of an evaluation."""
    return json.dumps(json.loads(output)["values"])


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file, the command that reads it, and the result of the command."""

    files: str
    """Pattern of the files."""
    command: tuple[str, ...]
    result: Callable[[str], str] = lambda output: output
    """Result of the command, from what it prints; called in its working folder."""
    by_hand: bool = False
    """True for text of the user, in which a change is another request."""


CONFIG = ("--config", "net.yaml")
KINDS = {
    "safetensors": Kind(
        files="net.safetensors", command=("convert", "net.safetensors", "out.safetensors"), result=converted
    ),
    "ckpt": Kind(files="last.ckpt", command=("convert", "last.ckpt", "out.safetensors"), result=converted),
    "pt": Kind(files="net.pt", command=("convert", "net.pt", "out.safetensors", *CONFIG), result=converted),
    "npz of images": Kind(
        files="images.npz",
        command=("shard", "images.npz", "--output", "out", "--progress", "off"),
        result=lambda _: bytes_of(Path("out")),
    ),
    "npz of statistics": Kind(files="r.npz", command=("evaluate", "run", *EVALUATE), result=values_of),
    "shard of a run": Kind(
        files="run/shards/*.tar",
        command=("export", "run", "--npz", "out.npz"),
        result=lambda _: bytes_of(Path("out.npz")),
    ),
    "run.json": Kind(files="run/run.json", command=("compare", "run")),
    "evaluation.json": Kind(files="run/evaluation.json", command=("compare", "run")),
    "shard": Kind(
        files="shards/*.tar",
        command=("shard", "shards", "--output", "out", "--progress", "off"),
        result=lambda _: bytes_of(Path("out")),
    ),
    "shards.json": Kind(
        files="shards/shards.json",
        command=("shard", "images", "--labels", "labels.csv", "--output", "shards", "--progress", "off"),
        result=lambda _: bytes_of(Path("shards")),
    ),
    "index of a shard": Kind(files="cache/shards/*.npy", command=("evaluate", "shards", *EVALUATE), result=values_of),
    "index of an LMDB": Kind(files="cache/lsun/*.npy", command=("evaluate", "lsun", *EVALUATE), result=values_of),
    "cached statistics": Kind(
        files="cache/statistics/*.npz",
        command=("evaluate", "run", *EVALUATE[2:], "--reference", "images"),
        result=values_of,
    ),
    "LMDB": Kind(files="lsun/data.mdb", command=("evaluate", "lsun", *EVALUATE), result=values_of),
    "PNG": Kind(files="images/*/*.png", command=("evaluate", "images", *EVALUATE), result=values_of),
    "YAML": Kind(files="net.yaml", command=("convert", "net.pt", "out.safetensors", *CONFIG), by_hand=True),
    "CSV": Kind(
        files="labels.csv",
        command=("shard", "images", "--labels", "labels.csv", "--output", "out", "--progress", "off"),
        by_hand=True,
    ),
}


# --------------------------------------------------------------------------------------------------- mutations


def position(data: bytearray, rng: np.random.Generator) -> int:
    """Return a position: anywhere, or near the start or the end, where headers and directories are."""
    near = [len(data), min(len(data), 600), min(len(data), 600)]
    choice = int(rng.integers(3))
    offset = int(rng.integers(max(1, near[choice])))
    return len(data) - 1 - offset if choice == 2 else offset


def flip(data: bytearray, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 5))):
        data[position(data, rng)] ^= 1 << int(rng.integers(8))


def write_digit(data: bytearray, rng: np.random.Generator) -> None:
    """Replace a digit of a text, or else a byte, by another digit."""
    digits = [index for index, byte in enumerate(data[:100_000]) if 48 <= byte < 58]
    data[digits[int(rng.integers(len(digits)))] if digits else position(data, rng)] = 48 + int(rng.integers(10))


def cut(data: bytearray, rng: np.random.Generator) -> None:
    del data[position(data, rng) :]


def remove(data: bytearray, rng: np.random.Generator) -> None:
    start = position(data, rng)
    del data[start : start + int(rng.integers(1, 64))]


def insert(data: bytearray, rng: np.random.Generator) -> None:
    start = position(data, rng)
    data[start:start] = rng.bytes(int(rng.integers(1, 64)))


def blank(data: bytearray, rng: np.random.Generator) -> None:
    start = position(data, rng)
    size = min(len(data) - start, int(rng.integers(1, 512)))
    data[start : start + size] = bytes(size)


def swap(data: bytearray, rng: np.random.Generator) -> None:
    """Exchange two parts of equal length, such as members of an archive."""
    size = int(rng.choice([1, 16, 512, 1024]))
    first, second = sorted(int(rng.integers(max(1, len(data) - size + 1))) // size * size for _ in range(2))
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )


def append(data: bytearray, rng: np.random.Generator) -> None:
    data += rng.bytes(int(rng.integers(1, 2000)))


MUTATIONS: tuple[Mutation, ...] = (flip, write_digit, cut, remove, insert, blank, swap, append)


# -------------------------------------------------------------------------------------------------- one command


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command did."""

    name: str
    """done, refused, traceback, exit code N, hang or signal N."""
    text: str = ""
    """Result, or the last line of the error stream."""


def execute(kind: Kind, folder: Path) -> Outcome:
    """Run a kind's command in a folder, in a forked process."""
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read_end)
        report = json.dumps(_execute_here(kind, folder)).encode()
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(report)
        os._exit(0)
    os.close(write_end)
    content, deadline = b"", time.monotonic() + SECONDS
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not (part := pipe.read(1 << 16)):
                break
            content += part
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(name="hang")
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return Outcome(name=f"signal {os.WTERMSIG(status)}")
    return Outcome(**json.loads(content))


def _execute_here(kind: Kind, folder: Path) -> dict[str, str]:
    os.chdir(folder)
    os.environ["SAGL_CACHE"] = str(folder / "cache")
    output, error = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(error):
            code = cli.main(list(kind.command))
            result = kind.result(output.getvalue()) if code == 0 else ""
    except SystemExit as end:
        return {"name": f"exit code {end.code}", "text": error.getvalue()[-300:]}
    except BaseException:
        return {"name": "traceback", "text": " | ".join(traceback.format_exc().splitlines()[-3:])}
    lines = error.getvalue().splitlines()
    if code == 0:
        return {"name": "done", "text": result}
    is_line = code == 2 and bool(lines) and lines[-1].startswith("sagl ")
    return {"name": "refused" if is_line else f"exit code {code}", "text": lines[-1] if lines else ""}


def restore(whole: Path, folder: Path) -> None:
    """Replace a folder by a copy of the files as they were written; their times remain, on which caches depend."""
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)


def mutate(kind: Kind, whole: Path, folder: Path, seed: int) -> tuple[Outcome, str]:
    """Damage one file in a copy of all of them and run the command; return its outcome, and what was changed."""
    rng = np.random.default_rng(seed)
    restore(whole, folder)
    files = sorted(folder.glob(kind.files))
    file, mutation = files[int(rng.integers(len(files)))], MUTATIONS[int(rng.integers(len(MUTATIONS)))]
    times, data = file.stat(), bytearray(file.read_bytes())
    before = bytes(data)
    while bytes(data) == before:
        mutation(data, rng)
    file.write_bytes(data)
    if rng.integers(2):  # as damage of a disk
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    return execute(kind, folder), f"{mutation.__name__} in {file.relative_to(folder)}"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", type=int, default=500)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--kind", nargs="*", default=list(KINDS))
    args = p.parse_args()
    torch.set_num_threads(1)
    EXTRACTORS["effnet_lite0_64"] = lambda device: lambda images: images.float().mean(dim=3).flatten(1)[:, :12]
    failures, counts = 0, {name: Counter[str]() for name in args.kind}
    with tempfile.TemporaryDirectory() as temporary:
        whole, folder = Path(temporary) / "whole", Path(temporary) / "folder"
        os.environ["SAGL_CACHE"] = str(folder / "cache")
        folder.mkdir()
        write_files(folder)
        shutil.copytree(folder, whole)
        os.chdir(temporary)
        expected = {}
        for name in args.kind:
            restore(whole, folder)
            expected[name] = execute(KINDS[name], folder)
            assert expected[name].name == "done", (name, expected[name])
        for index in range(args.count):
            name, seed = args.kind[index % len(args.kind)], args.seed + index
            kind = KINDS[name]
            outcome, change = mutate(kind, whole, folder, seed)
            label = outcome.name
            if label == "done" and not kind.by_hand:
                label = "same" if outcome.text == expected[name].text else "other result"
            counts[name][label] += 1
            if label not in ("same", "refused") and not (label == "done" and kind.by_hand):
                failures += 1
                print(f"--seed {seed} --count 1 --kind '{name}': {change}: {label}: {outcome.text[:300]}", flush=True)
    for name, counter in counts.items():
        print(f"{name}: {', '.join(f'{count} {label}' for label, count in sorted(counter.items()))}")
    print(f"{args.count} mutations, {failures} failures.")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
