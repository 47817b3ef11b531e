"""What is installed works from anywhere: the wheel holds weights and configs, and runs without the checkout."""

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
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed, folder, *arguments):
    """The command from the unpacked wheel, in another folder, with a home of its own."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "HOME": str(folder)}
    line = [sys.executable, "-m", "sagl.cli", *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_code_weights_and_configs_and_nothing_else(installed):
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    configs = {f"sagl/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    weights = {f"sagl/models/weights/{name}.safetensors" for name in ("fashion_mnist", "fashion_mnist_classifier")}
    assert (
        configs | weights | {"sagl/cli.py", "sagl/evaluation/paper.yaml", "sagl/evaluation/report.html.jinja"} <= names
    )
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sagl"}
    assert {Path(name).suffix for name in names if name.startswith("sagl/")} == {
        ".py",
        ".yaml",
        ".safetensors",
        ".jinja",
    }


def test_the_installed_command_samples_from_another_folder(installed, tmp_path):
    flags = ["--sag.scale", "0.05", "--num_samples", "1", "--respacing", "2", "--progress", "off"]
    done = run(installed, tmp_path, "sample", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples" / "grid.png").is_file()


def test_the_installed_command_finds_its_configs_by_name(installed, tmp_path):
    done = run(installed, tmp_path, "sample", "--config", "lsun_ct")
    assert done.returncode == 2
    assert f"one of {', '.join(sorted(path.stem for path in (ROOT / 'configs').glob('*.yaml')))}" in done.stderr
    done = run(installed, tmp_path, "sample", "--config", "lsun_cat", "--labels", "3")
    assert "--labels" in done.stderr  # refused before anything is fetched
