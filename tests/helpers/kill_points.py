"""Kill a command at each event of the file system, repeat it, and compare with a run that was not disturbed.

`python -m tests.helpers.kill_points COMMAND [MAX_POINTS]` prints the number of points and the differences. An event is
a file that is opened for writing, created, locked, renamed or removed, a folder that is created or removed, and a sync
to disk. The process kills itself just before the event. All runs are forks of one process that has imported sagl.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import torch

import sagl
from sagl import cli
from sagl.metrics.extractors import EXTRACTORS
from tests.helpers.commands import write_folder_config
from tests.helpers.networks import write_grey_unet

SAMPLE = [
    "sample",
    "--checkpoint",
    "tiny.safetensors",
    "--respacing",
    "ddim2",
    "--sampler",
    "ddim",
    "--sag.scale",
    "0.5",
]
SAMPLE += ["--sag.site", "middle", "--trainer.precision", "32-true", "--batch_size", "2", "--num_samples", "4"]
SAMPLE += ["--progress", "off", "--output", "out/run", "--compare", "--exports", "strip"]
FEATURES = ["--trainer.accelerator", "cpu", "--extractor", "effnet_lite0_64", "--progress", "off"]
COMMANDS = {
    "sample": SAMPLE,
    "export": ["export", "out/run", "--npz", "out/a.npz", "--images", "out/images", "--grid", "out/grid.png"],
    "convert": ["convert", "tiny.safetensors", "out/b.safetensors"],
    "diffusers": ["convert", "colour.safetensors", "out/diffusers"],
    "shard": ["shard", "data/images", "--labels", "folders", "--shard_size", "20", "--progress", "off"],
    "statistics": ["statistics", "out/run", "--output", "out/statistics.npz", "--overwrite", *FEATURES],
    "evaluate": ["evaluate", "out/run", "--reference", "reference", "--output", "out/e.json", "--overwrite", *FEATURES],
    "compare": ["compare", "out/run", "--output", "out/page.html"],
    "fit": ["fit", "--config", "data/config.yaml", "--output", "out/fit", "--resume"],
}
COMMANDS["shard"] += ["--output", "out/shards"]
NEED_RUN = ("export", "statistics", "evaluate", "compare")
EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock")
TIMES = ("seconds", "num_timed_batches", "sha256")  # the last is of a file with the others


def run(arguments, kill_at=None, log=None):
    """Run a command in a fork; return its exit code, or minus a signal, and the number of events.

    Args:
        arguments: the command line.
        kill_at: number of the event at which the fork kills itself; None: never.
        log: file for its output.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        output = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        counter = EventCounter(kill_at)
        sys.addaudithook(counter.on_event)
        sync = os.fsync
        os.fsync = lambda descriptor: [counter.count(), sync(descriptor)]
        code = 1
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            counter.stop()
            os.write(writer, str(counter.events).encode())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(text or 0)


class EventCounter:
    """Counts the events of a process, and kills it at one of them."""

    def __init__(self, kill_at):
        self.events, self.kill_at = 0, kill_at

    def on_event(self, name, arguments):
        writes = (
            name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if (writes and not str(arguments[0]).startswith("/dev/")) or name in EVENTS:
            self.count()

    def count(self):
        if self.events == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.events += 1

    def stop(self):
        self.kill_at = None


def snapshot(folder):
    """Return the content of all files and the names of all empty folders, without times, logs and
    complete files of the cache, whose names depend on times."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            files |= {} if any(path.iterdir()) else {name: "folder"}
        elif "tfevents" not in name and not (name.startswith("cache/") and path.suffix in (".npy", ".npz")):
            files[name] = path.read_bytes()
            if path.suffix == ".json":
                content = json.loads(files[name])
                if path.name in ("run.json", "evaluation.json"):
                    del content["sha256"]  # of the whole content, with its times
                files[name] = _without_times(content)
            elif path.suffix == ".ckpt":  # the order of the bytes of a resumed run differs, their values do not
                files[name] = _plain(torch.load(path, weights_only=True))
            elif path.suffix == ".html":
                files[name] = b""
    return files


def _plain(value):
    """Return a checkpoint with the bytes of tensors in their place, without Lightning's counts of validation batches.

    They are not read, and a resumed run counts one more.
    """
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items() if not str(name).startswith("epoch_loop.val_loop")}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def _without_times(value):
    if isinstance(value, dict):
        return {name: _without_times(part) for name, part in value.items() if name not in TIMES}
    return [_without_times(part) for part in value] if isinstance(value, list) else value


def prepare(folder, command):
    """Write the inputs of a command; return the name of the folder that is to be copied for each run."""
    os.chdir(folder)
    write_grey_unet(Path("tiny.safetensors"))
    (folder / "data").mkdir()
    options = {"trainer": {"max_steps": 2, "val_check_interval": 1, "precision": "32-true"}}
    write_folder_config(folder / "data", data={"num_workers": 0}, **options, save_every_steps=1)
    shutil.copytree("data/images/0", "reference")
    if command == "diffusers":
        colours = {"in_channels": 3, "num_classes": None, "null_label": False}
        write_grey_unet(Path("colour.safetensors"), **colours)
    if command in NEED_RUN:
        assert run(SAMPLE)[0] == 0
    os.makedirs("out", exist_ok=True)
    shutil.copytree("out", "before")


def check(command, max_points):
    """Kill a command at up to so many of its events; return the number of points and the differences."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        os.environ["SAGL_CACHE"] = str(folder / "out" / "cache")
        prepare(folder, command)
        arguments = COMMANDS[command]
        code, events = run(arguments, log="log")
        assert code == 0, Path("log").read_text()
        expected, differences = snapshot(folder / "out"), []
        points = sorted({round(k * (events - 1) / max(1, max_points - 1)) for k in range(min(events, max_points))})
        for point in points:
            shutil.rmtree("out")
            shutil.copytree("before", "out")
            killed, _ = run(arguments, point)
            code, _ = run(arguments, log="log")
            actual = snapshot(folder / "out")
            wrong = sorted(file for file in {*actual, *expected} if actual.get(file) != expected.get(file))
            print(end=".", file=sys.stderr, flush=True)
            if killed != -signal.SIGKILL or code not in (0, 2) or wrong:  # 2: refused because the output is complete
                last_line = Path("log").read_text().strip().splitlines()[-1:]
                differences.append(f"{command} at event {point}: exit codes {killed}, {code}: {wrong} {last_line}")
        os.chdir("/")
    return len(points), differences


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module in walk_packages(sagl.__path__, "sagl."):
        import_module(module.name)  # once, and not in every fork
    EXTRACTORS["effnet_lite0_64"] = lambda device: lambda images: images.float().mean(dim=3).flatten(1)[:, :12]
    number, found = check(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
    print(f"{sys.argv[1]}: killed at {number} points, {len(found)} differences", *found, sep="\n")
    sys.exit(bool(found))
