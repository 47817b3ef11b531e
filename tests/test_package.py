"""The wheel contains weights and configs, and runs in any folder without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed, folder, *arguments):
    """Run the command of the unpacked wheel in a folder that is also its home."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "HOME": str(folder)}
    line = [sys.executable, "-m", "sagl.cli", *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_code_weights_and_configs_and_nothing_else(installed):
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    configs = {f"sagl/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    weights = {f"sagl/models/weights/{name}.safetensors" for name in ("fashion_mnist", "fashion_mnist_classifier")}
    assert configs | weights | {"sagl/cli.py", "sagl/data/emoji_test.npz", "sagl/evaluation/report.html.jinja"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sagl"}
    assert {Path(name).suffix for name in names if name.startswith("sagl/")} == {
        ".py",
        ".yaml",
        ".safetensors",
        ".jinja",
        ".npz",
    }
    licenses = {name.split("/licenses/")[1] for name in names if "/licenses/" in name}
    assert licenses == {"LICENSE", "LICENSES/Apache-2.0.txt", "LICENSES/emoji.md"}


@pytest.mark.slow
def test_the_installed_command_samples_in_another_folder(installed, tmp_path):
    flags = ["--sag.scale", "0.05", "--num_samples", "1", "--respacing", "2", "--progress", "off"]
    process = run(installed, tmp_path, "sample", *flags)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "samples" / "grid.png").is_file()


def test_the_installed_command_finds_its_configs_by_name(installed, tmp_path):
    process = run(installed, tmp_path, "sample", "--config", "lsun_ct")
    assert process.returncode == 2
    assert f"one of {', '.join(sorted(path.stem for path in (ROOT / 'configs').glob('*.yaml')))}" in process.stderr
