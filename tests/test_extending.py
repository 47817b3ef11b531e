"""The page on extending sagl, executed: a guidance method and a sampler, each by one file and one line."""

import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.processes import import_from, run_program

ROOT = Path(__file__).parent.parent
GUIDANCE_PAGE, SAMPLER_PAGE = (ROOT / "docs" / "extending.md").read_text().split("# Add a sampler")
SHORT = {"sample": ["--num_samples", "2", "--batch_size", "2", "--respacing", "2", "--progress", "off"], "compare": []}


def block(page, language):
    return re.search(rf"```{language}\n(.*?)```", page, flags=re.S)[1]


def add_entry(file, head, entry):
    text = file.read_text()
    assert text.count(head) == 1
    file.write_text(text.replace(head, f"{head} {entry.strip()} "))


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the package with the page's files and lines; returns a function that runs a command."""
    folder = tmp_path_factory.mktemp("extended")
    package = folder / "sagl"
    shutil.copytree(ROOT / "sagl", package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "configs").symlink_to(ROOT / "configs")
    (package / "guidance" / "independent_condition.py").write_text(block(GUIDANCE_PAGE, "python"))
    head = "GUIDANCES: dict[str, GuidanceEntry] = {"
    add_entry(package / "guidance" / "registry.py", head, block(GUIDANCE_PAGE, "text"))
    (package / "samplers" / "plms.py").write_text(block(SAMPLER_PAGE, "python"))
    add_entry(package / "settings" / "sampling.py", "SAMPLERS = {", block(SAMPLER_PAGE, "text"))

    def run(*arguments):
        log = folder / "output.txt"
        log.unlink(missing_ok=True)
        code, output = run_program(arguments, folder, log, prepare=partial(import_from, folder))
        assert code == 0, output
        return output

    run.folder = folder
    return run


def test_the_help_has_the_flags_of_the_new_method_and_the_new_sampler(extended):
    text = extended("sample", "--help")
    for setting in ("scale", "interval", "redraw"):
        assert f"--icg.{setting}" in text
    assert "Draw another class" in text
    assert "plms" in text


@pytest.mark.slow
def test_the_commands_of_the_page_sample_record_and_compare(extended):
    for command in (block(GUIDANCE_PAGE, "bash") + block(SAMPLER_PAGE, "bash")).splitlines():
        _, subcommand, *arguments = shlex.split(command)
        extended(subcommand, *arguments, *SHORT[subcommand])
    plain, guided, solved = (
        json.loads((extended.folder / name / "run.json").read_text()) for name in ("plain", "guided", "solved")
    )
    assert guided["settings"]["icg"]["scale"] == 0.5
    assert guided["nfe"] > plain["nfe"]
    assert "icg" in (extended.folder / "comparison.html").read_text()
    assert solved["settings"]["sampler"] == "plms"
