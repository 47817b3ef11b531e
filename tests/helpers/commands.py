"""Commands in this process, and trainings in child processes which tests kill, resume and compare."""

import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

from sagl import cli
from tests.helpers.files import contents
from tests.helpers.networks import GREY
from tests.helpers.processes import Process

MODEL = {"network": {**GREY, "dropout": 0.1}, "optimizer": {"learning_rate": 1e-4}, "label_dropout": 0.2}
MODEL |= {"diffusion": {"noise_schedule": "cosine"}}
TRAINER = {"accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False}
TRAINER |= {"check_val_every_n_epoch": None, "gradient_clip_val": 1.0}
LOSS_SECOND_MOMENT = {"diffusion": {"noise_schedule": "cosine", "num_timesteps": 4}}
LOSS_SECOND_MOMENT |= {"loss": {"timestep_sampler": "loss_second_moment"}}
"""Loss-aware timestep sampling; the histories of so few timesteps are soon full."""


def write_images(root, count=50):
    """Write random images of three classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 12, 10), dtype=np.uint8)
    for k, image in enumerate(pixels):
        (root / str(k % 3)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / str(k % 3) / f"{k}.png")


def write_folder_config(folder, *, model=None, data=None, trainer=None, **top):
    """Write a configuration and its images; return the path of the configuration."""
    write_images(folder / "images")
    init = {"root": str(folder / "images"), "labels": "folders", "num_validation": 5, "random_crop": True}
    config = {"model": {**MODEL, **(model or {})}, "trainer": {**TRAINER, **(trainer or {})}}
    config |= {"data": {"class_path": "sagl.data.folder.FolderData", "init_args": {**init, **(data or {})}}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "preview": {"num_samples": 0}, "ema_decay": 0.9, **top}))
    return path


def exit_code(*arguments):
    """Run a command in this process and return its exit code."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def refusal(capture, folder, *arguments, names=()):
    """Run a command that must be refused with one line that has these names, and change nothing below a folder.

    Return the line. `capture` is pytest's capsys or capfd.
    """
    files, paths = contents(folder), sorted(folder.rglob("*"))
    capture.readouterr()
    assert exit_code(*arguments) == 2
    output = capture.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith(f"sagl {arguments[0]}: ")
    assert [name for name in map(str, names) if name not in line] == []
    assert (output.out, contents(folder), sorted(folder.rglob("*"))) == ("", files, paths)
    return line


class Fit:
    """`sagl fit` in one child process, or in several as torchrun starts them.

    `prepare` is a function that is called in each process before the command.
    """

    def __init__(self, config, output, *flags, ranks=1, prepare=None):
        self.output, self.log = output, output.with_suffix(".output")
        self.first_save, self.first_logs = save_time(output), logs(output)
        command = ["fit", "--config", config, "--output", output, *flags]
        if ranks > 1:
            command += ["--trainer.devices", ranks, "--trainer.strategy", "ddp"]
        self.processes = [
            Process(command, Path.cwd(), self.log, variables, prepare=prepare) for variables in environments(ranks)
        ]

    def wait(self, timeout=100):
        """Wait for the end; return the exit codes."""
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            self.kill()

    def finish(self):
        """Wait until all processes have ended with exit code 0; return the run folder."""
        assert set(self.wait()) == {0}, self.log.read_text()
        return self.output

    def send(self, number):
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self):
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def pause_when(self, condition, timeout=100):
        """Wait for a condition; the processes are stopped when this returns."""
        deadline = time.monotonic() + timeout
        while True:
            assert all(process.poll() is None for process in self.processes), self.log.read_text()
            assert time.monotonic() < deadline, "timeout"
            if condition():
                self.send(signal.SIGSTOP)
                if condition():
                    return
                self.send(signal.SIGCONT)
            time.sleep(0.0005)

    def kill_after_a_save(self, seconds):
        """Kill the processes a time after their first checkpoint."""
        self.pause_when(lambda: save_time(self.output) != self.first_save)
        self.send(signal.SIGCONT)
        time.sleep(seconds)
        self.kill()

    def terminate(self):
        """Send SIGTERM to the last process during training; all processes must end with exit code 0."""
        self.pause_when(lambda: any(losses_in(path) for path in logs(self.output) - self.first_logs))
        self.processes[-1].send_signal(signal.SIGTERM)
        self.send(signal.SIGCONT)
        self.finish()


def environments(ranks):
    """Return the variables of each process: one thread, and torchrun's variables for several processes."""
    base = {"OMP_NUM_THREADS": "1"}
    if ranks == 1:
        return [base]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {**base, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "run"}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def overflow():
    """Make the loss of the last rank infinite in one of the two batches of step 1, and in both of step 3."""
    from sagl.modules.diffusion_module import DiffusionModule

    step = DiffusionModule._compute_losses

    def losses(module, *args):
        loss, trainer = step(module, *args), module.trainer
        bad = trainer.fit_loop.total_batch_idx in (3, 6, 7) and trainer.global_rank == trainer.world_size - 1
        return replace(loss, total=loss.total * float("inf")) if bad else loss

    DiffusionModule._compute_losses = losses


# ---------------------------------------------------------------------------------------------------------- results


def save_time(output):
    """Return the time of the last checkpoint, 0 before the first."""
    path = output / "checkpoints" / "last.ckpt"
    return path.stat().st_mtime_ns if path.exists() else 0


def checkpoint_of(output):
    return torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)


def logs(output):
    return set((output / "logs").glob("*tfevents*"))


def scalars_in(path):
    """Return the values of one file by (tag, step)."""
    scalars = {}
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value if event.HasField("summary") else ():
            if value.tag.startswith(("train/", "val/")) and value.HasField("tensor"):
                scalars[value.tag, event.step] = float(tensor_util.make_ndarray(value.tensor))
    return scalars


def curves(output):
    """Return all logged values but times and memory by (tag, step); later files override earlier ones."""
    scalars = {}
    for path in sorted(logs(output), key=lambda path: path.name.split(".")[3]):  # by creation time
        scalars |= scalars_in(path)
    timings = ("train/images_per_second", "train/peak_memory_gb")
    return {key: value for key, value in scalars.items() if key[0] not in timings}


def losses_in(path):
    """Return the training losses by step."""
    return [value for (tag, _), value in sorted(scalars_in(path).items()) if tag == "train/loss"]


def differences(one, other, path=""):
    """Return the differences of two checkpoints by name."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [d for name in one for d in differences(one[name], other[name], f"{path}/{name}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{path}: length"]
        return [d for k in range(len(one)) for d in differences(one[k], other[k], f"{path}/{k}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [f"{path}: {one} {other}"[:200]]
