"""The tutorial: its notebook has the commands of the page, and runs in a small form."""

import os
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "site"))
SMALL = {
    "STEPS = 100": "STEPS = 2",
    "SAMPLES = 32": "SAMPLES = 4",
    '"logsnr10"': '"logsnr2"',
    "300), (": "40), (",
    "200))": "20))",
    "--num_samples 16": "--num_samples 4",
}
"""Changes of the cells for a quick run."""


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(ROOT / "notebooks" / "tutorial.ipynb", as_version=4)


def test_the_notebook_is_that_of_the_page(notebook):
    from tutorial_notebook import build

    assert build() == notebook, "run: python docs/site/tutorial_notebook.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_notebook_runs_in_a_small_form(notebook, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    for cell in notebook.cells:
        if cell.cell_type == "code":
            for full, small in SMALL.items():
                cell.source = cell.source.replace(full, small)
            cell.source = cell.source.replace("!sagl ", "%run -m sagl ")  # in the kernel, which imports PyTorch once
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for name in ("runs/flowers/checkpoints/last.ckpt", "runs/guided/grid.png", "runs/compared.html"):
        assert (tmp_path / name).is_file(), name
    assert all((tmp_path / f"runs/{name}/evaluation.json").is_file() for name in ("plain", "guided"))
