"""The documentation site: it builds without a warning, its links lead somewhere, it requests nothing from outside."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: pages by their path, and its folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    assert "WARNING" not in process.stderr
    return {path: path.read_text() for path in folder.rglob("*.html")}


def test_every_page_of_docs_is_in_the_site(site):
    names = {path.name for path in site}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} | {"index.html", "LICENSE.html"} <= names


def test_links_and_images_lead_to_files_and_anchors_of_the_site(site):
    dead = []
    for path, html in site.items():
        if path.name == "404.html":  # its links are those of the server's top folder
            continue
        for link in re.findall(r'(?:href|src)="(?!\w+:)([^"]+)"', html):
            file, anchor = urldefrag(unquote(link))
            target = (path.parent / file).resolve() if file else path
            if not target.exists() or (anchor and target in site and f'id="{anchor}"' not in site[target]):
                dead.append((path.name, link))
    assert dead == []


def test_pages_request_nothing_from_other_servers(site):
    requests = r'<(?:script|img|iframe|source)[^>]+src="(?:https?:)?//[^"]+|<link[^>]+href="https?://[^"]+|url\(["\']?(?:https?:)?//[^)]+'
    styles = [path.read_text() for path in next(iter(site)).parent.rglob("*.css")]
    assert [found for text in (*site.values(), *styles) for found in re.findall(requests, text)] == []


def test_lists_are_rendered_as_lists(site):
    """Python-Markdown makes a paragraph of a list without an empty line before it."""
    assert [
        (path.name, found) for path, html in site.items() for found in re.findall(r"^(?:<p>)?- .{,40}", html, re.M)
    ] == []


def test_tables_are_rendered_as_tables(site):
    """Python-Markdown makes a paragraph of a table without an empty line before it."""
    assert [path.name for path, html in site.items() if "|---" in html] == []


def test_equations_are_rendered(site):
    (equations,) = (html for path, html in site.items() if path.name == "equations.html")
    assert equations.count("<math") > 50
    assert "arithmatex" not in equations


def test_the_reference_has_every_setting_and_every_flag_of_a_guidance_method(site):
    (settings,) = (html for path, html in site.items() if path.name == "settings.html")
    (commands,) = (html for path, html in site.items() if path.name == "commands.html")
    for name in ("sag.blur_sigma", "model.network.num_channels", "trainer.precision", "preview.scales"):
        assert f"<code>{name}</code>" in settings
    assert "<code>--sag.blur_sigma</code>" in commands
