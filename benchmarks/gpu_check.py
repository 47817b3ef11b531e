"""Check of sagl on a machine with a GPU, in about half an hour.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py sample fit             # some sections
    python benchmarks/gpu_check.py --device cpu --small   # the same code on small networks, without a GPU

Every result is a line that begins with PASS, FAIL, INFO or SKIP; the last lines repeat the failures and what could not
be checked on this machine. No network connection is needed. Each section is a process of its own; with --device cpu
--small, all sections and their commands of one process run in this one.
"""

import argparse
import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # where sagl is not installed

from benchmarks import gpu_measures  # noqa: E402
from benchmarks.gpu_machine import Machine, Result, popen  # noqa: E402
from sagl import cli  # noqa: E402

LIMIT_SECONDS = 900
"""Longest time of a section."""
EMULATED = "this CPU emulates them"
"""Why 16-bit numbers are not checked."""
INTERACTIVE_SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash", "SLURM_JOB_ID": "1"}
"""Variables inside of `srun --pty bash`."""
SAG, CLASSIFIER = ("--sag.scale", 0.3), ("--classifier.scale", 1)
GUIDANCES: dict[str, tuple[object, ...]] = {
    "classifier and SAG": (*CLASSIFIER, *SAG),
    "CFG": ("--cfg.scale", 1),
    "SAG with the heads of its release": (*SAG, "--sag.heads", "sag_release"),
    "DDPM": ("--sampler", "ddpm", "--respacing", "4", *SAG),
    "DDIM with eta": ("--eta", 0.5),
    "compared, with a strip": (*SAG, "--compare", "--exports", "strip"),
}


class MachineOfOneProcess(Machine):
    """A machine whose commands run in this process if they need neither several nor other variables."""

    def run(self, *arguments: object, limit: int = 300, **variables: str) -> Result:
        devices = [value for flag, value in pairwise(arguments) if flag == "--trainer.devices"]
        if variables or devices[-1:] not in ([], [1]):
            return super().run(*arguments, limit=limit, **variables)
        start_time = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = cli.main([str(argument) for argument in arguments])
        return Result(code, out.getvalue(), err.getvalue(), time.monotonic() - start_time)


def environment(machine: Machine) -> None:
    """Check that torch and `sagl doctor` see the GPUs."""
    machine.report("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if machine.is_gpu:
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            capability = torch.cuda.get_device_capability(i)
            name = torch.cuda.get_device_name(i)
            machine.report(f"GPU {i}", f"{name}, {capability}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    result = machine.run("doctor")
    machine.check(
        result.code == 0 and f"default device {machine.device.type}" in " ".join(result.out.split()), "doctor", result
    )
    print(result.out)
    hidden = machine.run("doctor", CUDA_VISIBLE_DEVICES="")
    machine.check(hidden.code == 0, "doctor without a GPU", hidden)


def sample(machine: Machine) -> None:
    """Compare images of the GPU with those of the CPU in each precision, and check the choices of auto."""
    cpu = machine.sample("cpu", "--trainer.precision", "32-true", *SAG, accelerator="cpu")
    machine.check(cpu.code == 0, "sample on the CPU", cpu)
    for precision, limit in (("32-true", 0.5), ("bf16-true", 6.0), ("16-true", 6.0)):
        if precision != "32-true" and not machine.has_fast_16_bits:
            machine.skip(f"sample {precision}", EMULATED)
            continue
        result = machine.sample(precision, "--trainer.precision", precision, *SAG)
        machine.check(result.code == 0, f"sample {precision}", result)
        if result.code == cpu.code == 0:
            difference = np.abs(machine.images(precision) - machine.images("cpu"))
            details = f"difference {difference.mean():.4f} of 255, above 1 in {np.mean(difference > 1):.3%}"
            machine.check(difference.mean() < limit, f"{precision} agrees with float32 on the CPU", details)
    auto = machine.sample("auto", accelerator="auto")
    machine.check(auto.code == 0 and f"--trainer.accelerator {machine.accelerator}" in auto.out, "auto", auto)
    dry = machine.sample("dry", "--dry_run")
    machine.check(dry.code == 0, "dry run", dry)
    if machine.is_gpu:
        large = ("--num_samples", 65536, "--batch_size", 65536, "--trainer.precision", "32-true")
        result = machine.sample("large", *large)
        one_line = result.code == 2 and "batch_size" in result.err and "Traceback" not in result.err
        machine.check(one_line, "out of memory is one line", result.err[-300:])
    else:
        machine.skip("out of memory", "needs a GPU")


def guidance(machine: Machine) -> None:
    """Sample with every guidance method and sampler."""
    for name, flags in list(GUIDANCES.items())[:: 5 if machine.small else 1]:
        result = machine.sample(name.replace(" ", "_"), *flags)
        machine.check(result.code == 0, f"sample: {name}", result)


def digest(machine: Machine, name: str) -> str:
    """Return a digest of the images of a run."""
    return hashlib.sha256(machine.images(name).tobytes()).hexdigest()[:12]


def repeat(machine: Machine) -> None:
    """Compare the bytes of equal commands, for one process and several."""
    for name, flags in (("SAG", SAG), ("classifier", ("--classifier.scale", 2)))[: 1 if machine.small else None]:
        processes = [1, 1, *([min(machine.num_processes, 2)] if machine.num_processes > 1 else [])]
        results = [machine.sample(f"{name}{k}", *flags, devices=n) for k, n in enumerate(processes)]
        machine.check(all(result.code == 0 for result in results), f"{name} with {processes} processes", results[-1])
        digests = [digest(machine, f"{name}{k}") for k, result in enumerate(results) if result.code == 0]
        machine.check(len(set(digests)) == 1, f"the same bytes every time: {name}", digests)
    if machine.num_processes > 1:
        result = machine.sample("slurm", devices=2, limit=120, **INTERACTIVE_SLURM)
        machine.check(result.code == 0, "two processes inside of `srun --pty bash`", result)
    else:
        machine.skip("the same bytes with several processes", "one GPU")


def fit(machine: Machine) -> None:
    """Train, resume and validate in each precision; check the average, and metrics of previews."""
    precisions = ["bf16-true", "bf16-mixed"]
    if machine.is_gpu:
        precisions = ["32-true", "16-mixed", *precisions]
    elif not machine.has_fast_16_bits:
        machine.skip("fit in 16 bits", EMULATED)
        precisions = ["32-true"]
    for precision in precisions:
        name, steps = f"fit_{precision}", machine.num_steps
        flags = ("--trainer.precision", precision, "--preview.num_metric_samples", 8)
        result = machine.run(*machine.fit(name, "--trainer.max_steps", steps, *flags))
        machine.check(result.code == 0, f"fit {precision}, with metrics of previews", result)
        if result.code:
            continue
        content = torch.load(machine.folder / name / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
        weights = content["state_dict"].values()
        machine.check({w.dtype for w in weights} == {torch.float32}, f"the average is in float32, {precision}")
        machine.check(all(bool(w.isfinite().all()) for w in weights), f"the average is finite, {precision}")
        result = machine.run(*machine.fit(name, "--trainer.max_steps", 2 * steps, *flags, "--resume"))
        machine.check(result.code == 0, f"resume {precision}", result)
    trainer = ("--trainer.accelerator", machine.accelerator, "--trainer.devices", 1)
    result = machine.run("validate", machine.folder / f"fit_{precisions[-1]}", *trainer)
    machine.check(result.code == 0, "validate", result)


def distributed_fit(machine: Machine) -> tuple[object, ...]:
    """Return flags of a training on several processes."""
    flags = ("--trainer.devices", machine.num_processes, "--trainer.strategy", "ddp", "--data.batch_size", 4)
    return (*flags, "--preview.num_samples", 0, "--trainer.precision", "32-true")


def ddp(machine: Machine) -> None:
    """Train on several processes, resume, and stop by SIGTERM and by kill -9 of rank 0."""
    if machine.num_processes < 2:
        machine.skip("training on several processes", "one GPU")
        return
    flags, steps = distributed_fit(machine), machine.num_steps
    result = machine.run(*machine.fit("ddp", *flags, "--trainer.max_steps", steps))
    machine.check(result.code == 0, f"fit on {machine.num_processes} processes", result)
    found = [line for line in result.err.splitlines() if "arning" in line]
    if not machine.is_gpu:  # gradients of the CPU's 1x1 kernels have other strides, for the same bytes
        found = [line for line in found if "Grad strides" not in line]
    machine.check(not found, "no warnings", found[:3])
    result = machine.run(*machine.fit("ddp", *flags, "--trainer.max_steps", 2 * steps, "--resume"))
    machine.check(result.code == 0, "resume on several processes", result)
    for end, expected in ((signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)):
        name = f"end{int(end)}"
        process = popen(machine.fit(name, *flags, "--save_every_steps", 1))
        checkpoint = machine.folder / name / "checkpoints" / "last.ckpt"
        wait_until(checkpoint.exists, 120)
        children = child_processes(process.pid)
        process.send_signal(end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(90)
        machine.check(process.returncode == expected, f"{end.name} ends rank 0", process.returncode)
        ended = wait_until(lambda pids=children: not any(Path(f"/proc/{pid}").exists() for pid in pids), 20)  # type: ignore[misc]
        machine.check(ended, f"no process is left after {end.name} of rank 0", children)
        for pid in (process.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def child_processes(pid: int) -> list[int]:
    """Return the direct children of a process that compute, on Linux."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition; return whether it became true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.5)
    return condition()


def evaluate(machine: Machine) -> None:
    """Evaluate a run, and check that each process has a GPU of its own."""
    machine.sample("images", "--num_samples", 8 if machine.small else 256)
    devices = ("--trainer.accelerator", machine.accelerator, "--trainer.devices", machine.num_processes)
    run, batch = machine.folder / "images", ("--batch_size", 2, "--progress", "off")
    process = popen(("evaluate", run, "--reference", run, *devices, *batch))
    gpus: dict[str, set[str]] = {}
    query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    while process.poll() is None:
        for line in (
            subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
            if machine.is_gpu
            else ()
        ):
            pid, _, gpu = line.partition(", ")
            gpus.setdefault(pid, set()).add(gpu)
        time.sleep(0.5)
    machine.check(process.returncode == 0, f"evaluate on {machine.num_processes} processes", process.returncode)
    if machine.is_gpu and machine.num_processes > 1:
        own = all(len(names) == 1 for names in gpus.values()) and len(set().union(*gpus.values())) > 1
        machine.check(own, "each process of evaluate has a GPU of its own", list(map(len, gpus.values())))
    else:
        machine.skip("each process of evaluate has a GPU of its own", "needs several GPUs")


SECTIONS: Mapping[str, Callable[[Machine], None]] = {
    "environment": environment,
    "sample": sample,
    "fit": fit,
    **gpu_measures.SECTIONS,
    "evaluate": evaluate,
    "guidance": guidance,
    "repeat": repeat,
    "ddp": ddp,
}


def run_here(machine: Machine, names: Sequence[str]) -> list[str]:
    """Run sections in this process, and return the lines of their results."""
    for name in names:
        print(f"=== {name}", flush=True)
        SECTIONS[name](machine)
    return machine.lines


def run_in_process(name: str, flags: list[str]) -> list[str]:
    """Run a section in a process, print its lines, and return them."""
    command = [sys.executable, __file__, name, "--here", *flags]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        timer = threading.Timer(LIMIT_SECONDS, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        timer.cancel()
    if process.returncode:
        lines.append(f"FAIL {name}: the process ended with code {process.returncode}")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Run the sections, and summarise them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=f"Sections: {', '.join(SECTIONS)}.")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to exercise the code of this check.")
    parser.add_argument("--small", action="store_true", help="Small networks and few steps.")
    parser.add_argument("--folder", type=Path, default=None, help="Folder for runs; by default a temporary one.")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.here:
        run_here(Machine(device, arguments.small, arguments.folder), arguments.sections)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.small and arguments.device == "cpu":
            lines = run_here(MachineOfOneProcess(device, arguments.small, folder), arguments.sections)
        else:
            flags = ["--device", arguments.device, "--folder", str(folder), *(["--small"] if arguments.small else [])]
            lines = [line for name in arguments.sections for line in run_in_process(name, flags)]
    results = {kind: [line for line in lines if line.startswith(f"{kind} ")] for kind in ("PASS", "FAIL", "SKIP")}
    print("=== summary:", ", ".join(f"{len(found)} {kind}" for kind, found in results.items()))
    print("\n".join(results["SKIP"] + results["FAIL"]))
    sys.exit(bool(results["FAIL"]))


if __name__ == "__main__":
    main()
