"""What the documentation says is true: its code runs, the names it gives exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


@pytest.mark.parametrize("name", ["README.md", "docs/extending.md"])
def test_python_on_the_page_runs(name):
    code = blocks(ROOT / name, "python")
    assert code
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(code)], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_functions_exist(page):
    named = set(re.findall(r"`([\w/]+\.py)::([\w.]+)`", page.read_text()))
    missing = [(file, name) for file, name in named if name not in definitions(resolve(file))]
    assert missing == []


def test_every_equation_of_the_paper_has_a_row():
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "equations.md").read_text(), flags=re.M)
    assert rows == [str(number) for number in range(1, 19)]


def test_every_verb_of_the_readme_exists():
    from sagl.cli import VERBS

    verbs = set(re.findall(r"`sagl (\w+)", (ROOT / "README.md").read_text()))
    assert verbs == set(VERBS)


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
