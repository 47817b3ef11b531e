"""Write notebooks/tutorial.ipynb from docs/tutorial.md: python docs/site/tutorial_notebook.py.

Blocks of code become cells, with variables in place of some numbers; pictures are left out, being the output of cells.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
NOTEBOOK = ROOT / "notebooks" / "tutorial.ipynb"
PARAMETERS = {"STEPS": "--trainer.max_steps 100", "SAMPLES": "--num_samples 32", "RESPACING": "--respacing logsnr10"}
"""Variables of the notebook, and the flags of the page whose values they hold."""
INSTALL = """\
import importlib.util

if importlib.util.find_spec("sagl") is None:
    %pip install --quiet --editable "..[offline-metrics]"
"""


def build() -> nbformat.NotebookNode:
    """Return the notebook of the page."""
    title, page = PAGE.read_text().split("## 1. Install")
    rest = page[page.index("## 2.") :].partition("## Times")[0]
    values = (flag.split()[1] for flag in PARAMETERS.values())
    numbers = "".join(
        f"{name} = {value if value.isdigit() else repr(value)}\n"
        for name, value in zip(PARAMETERS, values, strict=True)
    )
    cells = [
        new_markdown_cell(
            f"# {title.splitlines()[0][2:]}\nThis notebook has the commands of docs/tutorial.md. It runs in "
            "the folder `notebooks` of a clone of the repository, on a GPU if there is one."
        ),
        new_code_cell(INSTALL.strip()),
        new_code_cell(numbers.replace("'", '"').strip()),
        *page_cells(rest),
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # new ones are random
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def page_cells(text: str) -> Iterator[nbformat.NotebookNode]:
    """Yield the cells of a part of the page: text, and blocks of code."""
    for part in re.split(r"(```\w+\n.*?```)", text, flags=re.S):
        block = re.fullmatch(r"```(\w+)\n(.*?)\n```", part, flags=re.S)
        if block is None:
            words = re.sub(
                r"^!\[.*\n|\]\((?=[\w#]+\.md)", lambda match: "](../docs/" if match[0] == "](" else "", part, flags=re.M
            )
            if words.strip():
                yield new_markdown_cell(words.strip())
        elif block[1] == "python":
            yield new_code_cell(block[2])
        elif block[1] == "bash":
            yield from (new_code_cell(f"!{with_names(line)}") for line in block[2].splitlines())
        else:
            yield new_markdown_cell(part)


def with_names(command: str) -> str:
    """Replace the values of some flags by the variables of the notebook."""
    for name, flag in PARAMETERS.items():
        command = command.replace(flag, f"{flag.split()[0]} {{{name}}}")
    return command


if __name__ == "__main__":
    NOTEBOOK.parent.mkdir(exist_ok=True)
    NOTEBOOK.write_text(nbformat.writes(build()) + "\n")
