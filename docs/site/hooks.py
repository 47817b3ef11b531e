"""Hooks of MkDocs: pages that are not in docs/, links between all of them, and equations.

The site mirrors the repository with the content of docs/ at the top: README.md is its first page, and a file outside of
docs/ that a page links to becomes a page at its own path.
"""

import posixpath
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import reference
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
TOP_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r'(\]\(|\b(?:src|href)=")(?!\w+:|#)([^)#"\s]+)')
NAME = re.compile(r"\[(?:docs/)?(\w+\.md)\](?=\((?:docs/)?\1)")
"""A link whose text is the name of a page, in place of which the site shows the page's title."""
FENCE = re.compile(r"(^```.*?^```$)", flags=re.M | re.S)
LIST_OR_TABLE = r"(?=[-*] |\d+\. |\|)"
BLOCK = re.compile(rf"^(?!\s*$|[-*|]|\d+\. |  )(.*\n){LIST_OR_TABLE}", flags=re.M)
"""A line of text before the first line of a list or table, which Python-Markdown separates by an empty line only."""
AFTER_CODE = re.compile(rf"\A(\n){LIST_OR_TABLE}")
"""The end of the last line of a block of code before a list or table, which needs an empty line likewise."""
HEADING = re.compile(r"(?<=\n)(#+ )")
"""Every heading but that of the page, which become smaller in a page of several parts."""
EQUATION = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', flags=re.S)
REPLACED = {"<mi>&#x0007E;</mi>": "<mo>&#x0223C;</mo>", '<mi mathvariant="script">N</mi>': "<mi>𝒩</mi>"}
"""MathML of the converter that browsers would show without space or without script."""


def on_config(config: MkDocsConfig) -> None:
    """Add the pages of the API reference to the navigation, and pages of docs/ that it does not list to the guides."""
    assert config.nav is not None
    listed = re.findall(r"\w+\.md", str(config.nav))
    guides = next(section["Guides"] for section in config.nav if "Guides" in section)
    guides += sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in listed)
    _replace_folder(config.nav, "reference/api/", [f"reference/api/{name}.md" for name in reference.api_modules()])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are generated, those of the top folder, and the files that pages link to."""
    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    docs = [f"docs/{file.src_uri}" for file in files.documentation_pages() if not file.generated_by]
    waiting, added = [*docs, *TOP_PAGES], set(docs)
    while waiting:
        path = waiting.pop()
        if path not in added and files.get_file_from_path(site_path(path)) is None:
            level = InclusionLevel.INCLUDED if path in TOP_PAGES else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, site_path(path), content=page_text(path), inclusion=level))
        added.add(path)
        waiting += [target for target in targets(path) if target not in added]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Separate blocks by empty lines, as Python-Markdown needs it, and lead links to the pages of the site."""
    source = page.file.src_uri
    if source.startswith("reference/"):
        return markdown
    path = next((path for path in TOP_PAGES if site_path(path) == source), source)
    path = path if path in TOP_PAGES or not (ROOT / "docs" / path).exists() else f"docs/{path}"

    def site_link(match: re.Match[str]) -> str:
        target = site_path(resolve(path, match[2]))
        return match[1] + posixpath.relpath(target, posixpath.dirname(source) or ".")

    parts = FENCE.split(markdown)
    has_parts = any("\n# " in part for part in parts[::2])
    for index in range(0, len(parts), 2):  # the others are blocks of code
        text = LINK.sub(site_link, NAME.sub(title, parts[index]))
        for pattern in (BLOCK, AFTER_CODE):
            text = pattern.sub(r"\1\n", text)
        parts[index] = HEADING.sub(r"#\1", text) if has_parts else text
    return "".join(parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert equations to MathML, which browsers show without a script; let lines break in `file.py::function`."""

    def mathml(match: re.Match[str]) -> str:
        text = convert(unescape(match[2]), "inline" if match[1] == "span" else "block")
        for wrong, right in REPLACED.items():
            text = text.replace(wrong, right)
        return text

    return EQUATION.sub(mathml, html).replace(".py::", ".py::<wbr>")


def resolve(path: str, link: str) -> str:
    """Return the path in the repository that a link of the file at `path` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def title(match: re.Match[str]) -> str:
    """Return the first heading of the page that a link names, in brackets."""
    path = ROOT / match[1] if match[1] in TOP_PAGES else ROOT / "docs" / match[1]
    heading = path.read_text().partition("\n")[0].removeprefix("# ")
    return f"[{heading}]"


def site_path(path: str) -> str:
    """Return the path in the site of a file of the repository."""
    if path == "README.md":
        return "index.md"
    path = path.removeprefix("docs/")
    return path if Path(path).suffix in (".md", ".png", ".svg", ".ipynb") else f"{path}.md"


def page_text(path: str) -> str:
    """Return the Markdown page of a file of the repository: its text, or a block with it."""
    text = (ROOT / path).read_text()
    return text if path.endswith(".md") else f"# {path}\n```text\n{text}```\n"


def targets(path: str) -> Iterator[str]:
    """Yield the files of the repository that the page at `path` links to."""
    if path.endswith(".md"):
        text = "".join(part for part in FENCE.split((ROOT / path).read_text()) if not part.startswith("```"))
        yield from (target for _, link in LINK.findall(text) if (ROOT / (target := resolve(path, link))).is_file())


def _replace_folder(nav: Any, folder: str, pages: list[str]) -> None:  # noqa: ANN401 (nested lists and mappings)
    for section in nav:
        for title, value in section.items() if isinstance(section, dict) else ():
            if value == folder:
                section[title] = pages
            elif isinstance(value, list):
                _replace_folder(value, folder, pages)
