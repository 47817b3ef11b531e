"""What the documentation says is true: its code runs, the names it gives exist."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sagl.commands.subcommands import SUBCOMMANDS
from tests.helpers.processes import run_program

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def run_process(folder, *arguments):
    """Run Python in a folder; it must succeed."""
    command = [sys.executable, *arguments]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, (arguments, process.stderr)


def run_sagl(folder, *arguments):
    """Run a command in a folder; it must succeed."""
    code, output = run_program(arguments, folder, folder / "output.txt")
    assert code == 0, (arguments, output)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


@pytest.mark.slow
def test_the_python_page_runs(tmp_path):
    code = blocks(ROOT / "docs" / "python.md", "python")
    assert code
    run_process(tmp_path, "-W", "error", "-c", "\n".join(code))


def test_guided_and_unguided_images_and_their_masks_take_ten_lines_of_python():
    first = blocks(ROOT / "docs" / "python.md", "python")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 10


SHORTER = {
    "playground": ["--help"],  # serves until it is interrupted
    "sample": ["--num_samples", "4", "--batch_size", "2", "--respacing", "2", "--progress", "off"],
    "fit": [
        *("--trainer.max_steps", "2", "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"),
        *("--trainer.precision", "32-true"),  # many CPUs emulate 16 bits
    ],
    "validate": ["--data.num_validation", "32"],
    "push": ["--output", "hub"],
    "test": ["--data.num_validation", "9968"],
    "statistics": ["--num_samples", "100"],
    "analyze": ["--num_samples", "2", "--respacing", "2"],
    "reproduce": ["--smoke"],
    "tune": [
        "--num_samples",
        "2",
        "--candidates",
        "2",
        "--report_samples",
        "4",
        "--respacing",
        "2",
        "--bootstrap",
        "0",
        "--reference",
        "reference.npz",
    ],
}
"""Flags that make a command of the README short; later flags override earlier ones."""


@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_the_order_of_the_page(tmp_path):
    commands = re.findall(r"^\| `sagl ([^`]+)`", (ROOT / "README.md").read_text(), flags=re.M)
    assert {command.split()[0] for command in commands} == set(SUBCOMMANDS)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    makefile = (ROOT / "Makefile").read_text()
    (before,) = re.findall(r"^\t\$\(BIN\)/sagl (sample .*)$", makefile, flags=re.M)  # make sample
    for command in (before, *commands):
        subcommand, *arguments = shlex.split(command)
        run_sagl(tmp_path, subcommand, *arguments, *SHORTER.get(subcommand, []))


@pytest.mark.slow
def test_the_steps_for_ones_own_images_run(tmp_path):
    block = re.search(r"^sagl fit --config my_images.*?```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    images = np.random.default_rng(0).integers(0, 256, (60, 40, 50, 3), dtype=np.uint8)
    (tmp_path / "my_images").mkdir()
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / "my_images" / f"{number}.jpg")
    for command in block[0].splitlines()[:2]:
        subcommand, *arguments = shlex.split(command)[1:]
        run_sagl(tmp_path, subcommand, *arguments, *SHORTER[subcommand])
    assert (tmp_path / "mine" / "grid.png").exists()
    assert (tmp_path / "runs" / "my_images" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_functions_exist(page):
    names = set(re.findall(r"`([\w/]+\.py)::([\w.]+)`", page.read_text()))
    missing = [(file, name) for file, name in names if name not in definitions(resolve(file))]
    assert missing == []


def test_every_equation_of_the_paper_has_a_row():
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "equations.md").read_text(), flags=re.M)
    assert rows == [str(number) for number in range(1, 19)]


def resolve(file):
    return next(path for path in (ROOT / "sagl" / file, ROOT / file) if path.exists())


def definitions(path):
    """Functions, classes, and methods and fields of classes."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = (getattr(n, "name", None) or getattr(getattr(n, "target", None), "id", None) for n in node.body)
            names |= {f"{node.name}.{name}" for name in inner if name}
    return names
