"""The page on extending sagl, executed: a guidance method by one file and one line."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
SHORT = {"sample": ["--num_samples", "2", "--batch_size", "2", "--respacing", "2", "--progress", "off"], "compare": []}


def block(language):
    return re.search(rf"```{language}\n(.*?)```", PAGE, flags=re.S)[1]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the package with the page's file and line; returns a function that runs its command."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "sagl", folder / "sagl", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "sagl" / "guidance" / "autoguidance.py").write_text(block("python"))
    registry = folder / "sagl" / "guidance" / "registry.py"
    head, entries = registry.read_text().split("GUIDANCES: dict[str, GuidanceEntry] = {\n")
    registry.write_text(f"{head}GUIDANCES: dict[str, GuidanceEntry] = {{\n    {block('text')}{entries}")

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        line = [sys.executable, "-m", "sagl.cli", *arguments]
        result = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run.folder = folder
    return run


def test_the_flags_of_the_new_method_are_in_the_help(extended):
    text = extended("sample", "--help")
    for setting in ("scale", "interval", "weak_checkpoint"):
        assert f"--autoguidance.{setting}" in text
    assert "Weaker network" in text


@pytest.mark.slow
def test_the_commands_of_the_page_guide_record_and_compare(extended):
    for command in block("bash").splitlines():
        _, verb, *arguments = shlex.split(command)
        extended(verb, *arguments, *SHORT[verb])
    (strong, guided) = (
        json.loads((extended.folder / name / "run.json").read_text()) for name in ("strong", "autoguided")
    )
    assert guided["settings"]["autoguidance"]["scale"] == 0.5
    assert guided["nfe"] > strong["nfe"]
    assert "autoguidance" in (extended.folder / "comparison.html").read_text()
