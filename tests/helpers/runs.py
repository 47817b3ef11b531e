"""Trainings of the real command line in processes of their own: to be killed, resumed and compared."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

from tests.helpers.tiny import GREY

MODEL = {"network": {**GREY, "dropout": 0.1}, "optimizer": {"learning_rate": 1e-4}, "label_dropout": 0.2}
MODEL |= {"diffusion": {"noise_schedule": "cosine"}}
TRAINER = {"accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False}
TRAINER |= {"check_val_every_n_epoch": None, "gradient_clip_val": 1.0}
LOSS_SECOND_MOMENT = {"diffusion": {"noise_schedule": "cosine", "num_timesteps": 4}}
LOSS_SECOND_MOMENT |= {"loss": {"timestep_sampler": "loss_second_moment"}}
"""With so few timesteps that their histories are soon full."""


def write_pictures(root, count=50):
    """Random pictures in three classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 12, 10), dtype=np.uint8)
    for k, picture in enumerate(pixels):
        (root / str(k % 3)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / str(k % 3) / f"{k}.png")


def write_config(folder, *, model=None, data=None, trainer=None, **top):
    """A whole configuration with pictures of its own beside it; returns the path."""
    write_pictures(folder / "pictures")
    init = {"root": str(folder / "pictures"), "labels": "folders", "num_validation": 5, "random_crop": True}
    config = {"model": {**MODEL, **(model or {})}, "trainer": {**TRAINER, **(trainer or {})}}
    config |= {"data": {"class_path": "sagl.data.folder.FolderData", "init_args": {**init, **(data or {})}}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "preview": {"num_samples": 0}, "ema_decay": 0.9, **top}))
    return path


class Fit:
    """`sagl fit` in a process of its own, or in several that share a run as torchrun would have started them."""

    def __init__(self, config, output, *flags, ranks=1, program=("-m", "sagl.cli")):
        self.output, self.log = output, output.with_suffix(".said")
        self.saved, self.logs = saves(output), logs(output)
        command = [sys.executable, *program, "fit", "--config", str(config), "--output", str(output), *flags]
        if ranks > 1:
            command += ["--trainer.devices", str(ranks), "--trainer.strategy", "ddp"]
        told = environments(ranks)
        with self.log.open("a") as said:
            self.processes = [subprocess.Popen(command, env=env, stdout=said, stderr=said) for env in told]

    def wait(self, timeout=100):
        """Exit codes."""
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            self.kill()

    def ends_well(self):
        """The run's folder, once all its processes have ended with exit code 0."""
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

    def until(self, happened, timeout=100):
        """Wait until something has happened to the run; the processes stand still when this returns."""
        deadline = time.monotonic() + timeout
        while True:
            assert all(process.poll() is None for process in self.processes), self.log.read_text()
            assert time.monotonic() < deadline, "it did not happen"
            if happened():
                self.send(signal.SIGSTOP)
                if happened():
                    return
                self.send(signal.SIGCONT)
            time.sleep(0.0005)

    def kill_after_a_save(self, seconds):
        """So long after its first checkpoint."""
        self.until(lambda: saves(self.output) != self.saved)
        self.send(signal.SIGCONT)
        time.sleep(seconds)
        self.kill()

    def ends_when_asked(self):
        """SIGTERM to the last of the processes, in the middle of training, ends all of them with exit code 0."""
        self.until(lambda: any(losses_in(path) for path in logs(self.output) - self.logs))
        self.processes[-1].send_signal(signal.SIGTERM)
        self.send(signal.SIGCONT)
        self.ends_well()


def environments(ranks):
    """Of each process: one thread; where it is one of several, what torchrun would tell it."""
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if ranks == 1:
        return [alone]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "run"}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


OVERFLOWING = ("-c", "from tests.helpers.runs import overflow; from sagl import cli; overflow(); cli.run()")
"""The command line, for a module whose loss is not finite at times."""


def overflow():
    """Have the last rank's loss be infinite in one batch of step 1, and in both of step 3, where two make a step."""
    from sagl.modules.diffusion_module import DiffusionModule

    step = DiffusionModule._compute_losses

    def losses(module, *args):
        found, trainer = step(module, *args), module.trainer
        bad = trainer.fit_loop.total_batch_idx in (3, 6, 7) and trainer.global_rank == trainer.world_size - 1
        return replace(found, total=found.total * float("inf")) if bad else found

    DiffusionModule._compute_losses = losses


# ------------------------------------------------------------------------------------------------ what came out


def saves(output):
    """A number that changes with every checkpoint."""
    path = output / "checkpoints" / "last.ckpt"
    return path.stat().st_mtime_ns if path.exists() else 0


def checkpoint_of(output):
    return torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)


def logs(output):
    return set((output / "logs").glob("*tfevents*"))


def scalars_in(path):
    """(tag, step) -> value of one file."""
    found = {}
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value if event.HasField("summary") else ():
            if value.tag.startswith(("train/", "val/")) and value.HasField("tensor"):
                found[value.tag, event.step] = float(tensor_util.make_ndarray(value.tensor))
    return found


def curves(output):
    """(tag, step) -> value of all that was logged but for times and memory, later files having their way."""
    found = {}
    for path in sorted(logs(output), key=lambda path: path.name.split(".")[3]):  # when they were begun
        found |= scalars_in(path)
    timings = ("train/images_per_second", "train/peak_memory_gb")
    return {key: value for key, value in found.items() if key[0] not in timings}


def losses_in(path):
    """Of the steps, in their order."""
    return [value for (tag, _), value in sorted(scalars_in(path).items()) if tag == "train/loss"]


def differences(one, other, path=""):
    """Where two checkpoints differ, by name."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [found for name in one for found in differences(one[name], other[name], f"{path}/{name}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{path}: length"]
        return [found for k in range(len(one)) for found in differences(one[k], other[k], f"{path}/{k}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [f"{path}: {one} {other}"[:200]]
