"""The page in a browser: Debian's chromium, without a window."""

import re
import shutil
import signal
import time
import urllib.request
import zipfile
from contextlib import contextmanager

import pytest

from tests.helpers.networks import write_grey_unet
from tests.helpers.playground import SAG, SETTINGS
from tests.helpers.processes import Process

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the page of a process; its libraries leave sockets open, which would be errors of other tests."""
    with served_page(tmp_path_factory.mktemp("playground"), signal.SIGTERM) as address:
        yield address


@contextmanager
def served_page(folder, stop_signal):
    """Serve the page in a new process, give its address, and end it by a signal while a page is open."""
    log = folder / "log.txt"
    network = write_grey_unet(folder / "tiny.safetensors")
    log.touch()
    command = ["playground", "--port=0", f"--checkpoint={network}", *SETTINGS, *SAG]
    process = Process(command, folder, log, module="sagl")
    deadline = time.monotonic() + 120
    try:
        while not (address := re.search(r"http://127[.]0[.]0[.]1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "timeout"
            time.sleep(0.05)
        yield f"{address[0]}/"
        with urllib.request.urlopen(f"{address[0]}/gradio_api/heartbeat/open", timeout=60):  # as a page in a browser
            process.send_signal(stop_signal)
            assert process.wait(30) == 128 + stop_signal, log.read_text()
    finally:
        process.send_signal(signal.SIGKILL)
    _, line = log.read_text().splitlines()
    assert line.startswith(f"sagl playground: {stop_signal.name}: ")


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_ends_the_page_in_one_line(stop_signal, tmp_path):
    with served_page(tmp_path, stop_signal):
        pass


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, site):
    """Function that opens the page in a session of its own and waits for its first images."""
    contexts = []

    def open_page(width=1400, height=900, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.requests = []
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(site)
        wait_for_status(page, "Done")
        page.locator("#step img").first.wait_for()  # the event that follows the last frame
        return page

    yield open_page
    for context in contexts:
        context.close()


def wait_for_status(page, text):
    page.locator("#status", has_text=text).wait_for()


def images(page, title):
    """Return the sources of the pictures of a row."""
    return page.locator(f"#rows [data-row='{title}'] img").evaluate_all("all => all.map(image => image.src)")


def set_number(page, name, value):
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.press("Enter")


def set_text(page, name, value):
    box = page.locator(f"#{name}").locator("input, textarea").first
    box.fill(value)
    box.press("Enter")


@needs_browser
def test_the_page_samples_at_once_and_asks_no_other_host(open_page, site):
    page = open_page()
    assert len(images(page, "Unguided")) == len(images(page, "Guided")) == len(images(page, "Mask of Guided")) == 2
    assert images(page, "Unguided") != images(page, "Guided")
    assert [url for url in page.requests if not url.startswith((site, "data:", "blob:"))] == []
    page.get_by_role("tab", name="Command and Python").click()
    assert "sagl sample --checkpoint" in page.locator("#command .cm-content").inner_text().replace("=", " ")
    assert "build_pipeline" in page.locator("#python .cm-content").inner_text()
    page.get_by_role("tab", name="Download").click()
    with page.expect_download() as download:
        page.locator("#downloads a").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert {"samples/run.json", "samples/grid.png"} <= set(archive.namelist())


@needs_browser
def test_moving_the_scale_redraws_the_guided_images_only(open_page):
    page = open_page()
    unguided, guided = images(page, "Unguided"), images(page, "Guided")
    slider = page.locator("#sag-scale input[type=range]").bounding_box()
    page.mouse.click(slider["x"] + 0.8 * slider["width"], slider["y"] + 0.5 * slider["height"])
    page.wait_for_function("before => !document.querySelector('#rows').innerHTML.includes(before)", arg=guided[1])
    wait_for_status(page, "Done")
    assert images(page, "Unguided") == unguided
    page.locator("#keep").click()
    wait_for_status(page, "These settings are A")
    set_number(page, "seed", 3)
    page.locator("#rows", has_text="A (kept)").wait_for()
    wait_for_status(page, "Done")
    assert images(page, "A (kept)") == images(page, "Guided") != guided


@needs_browser
def test_the_step_slider_shows_other_steps(open_page):
    page = open_page()
    pictures = page.locator("#step img")
    pictures.first.wait_for()
    assert pictures.count() == 6 + 5
    before = page.locator("#step").inner_html()
    page.locator("#position input[type=range]").press("ArrowRight")
    page.wait_for_function("before => document.querySelector('#step').innerHTML != before", arg=before)


@needs_browser
def test_a_refused_value_is_named_and_the_images_stay(open_page):
    page = open_page()
    before = images(page, "Guided")
    set_text(page, "labels", "9")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "--labels must be classes 0 … 2, got 9." in alert.inner_text()
    assert images(page, "Guided") == before


@needs_browser
def test_cancel_ends_the_sampling_for_which_a_second_session_waits(open_page):
    first, second = open_page(), open_page()
    first.get_by_text("sampler and steps").click()
    set_text(first, "respacing", "1000")
    first.locator("#rows", has_text="of 1000").wait_for()
    before = images(second, "Guided")
    set_number(second, "seed", 8)
    second.wait_for_timeout(500)
    assert images(second, "Guided") == before  # it waits
    first.locator("#cancel").click()
    wait_for_status(first, "Cancelled")
    second.wait_for_function("before => !document.querySelector('#rows').innerHTML.includes(before)", arg=before[0])
    wait_for_status(second, "Done")
    assert "of 1000" in first.locator("#rows").inner_text()  # the rest of the steps was not computed


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_the_guided_images_a_desktop(open_page, scheme):
    phone = open_page(390, 844, scheme)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    right = phone.evaluate(
        "Math.max(...[...document.querySelectorAll('img, input')].map(e => e.getBoundingClientRect().right))"
    )
    assert right <= 390
    desktop = open_page(1400, 900, scheme)
    box = desktop.locator("#rows [data-row='Guided'] img").nth(1).bounding_box()
    assert box["y"] + box["height"] <= 900
    assert box["width"] >= 4 * 8


def test_the_page_forbids_requests_to_other_hosts_and_unknown_downloads_are_named(site):
    with urllib.request.urlopen(site) as response:
        policy, html = response.headers["Content-Security-Policy"], response.read().decode()
    assert policy.startswith("default-src 'self'")
    assert "http" not in policy
    assert not re.findall(r"<(?:script|link)[^>]*https?://", html)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{site}runs/unknown.zip")
