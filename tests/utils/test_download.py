import io
import os
import random
import resource
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request

import pytest

from sagl.errors import UserError
from sagl.utils.download import _Redirects, download
from tests.helpers.errors import refused

BODY = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
ETAG, DATE = (("ETag", '"one"'),), (("Last-Modified", "yesterday"),)


@dataclass(frozen=True, kw_only=True)
class Response:
    """Behaviour of the server for one request."""

    status: int = 0
    """An error or a redirection."""
    body: bytes = BODY
    content_type: str = "application/octet-stream"
    validators: tuple[tuple[str, str], ...] = ETAG
    resumes: bool = True
    cut: int | None = None
    """Number of bytes of the body after which the connection ends."""
    stall: bool = False
    """Silence before the end of the connection."""
    sends_length: bool = True
    headers: tuple[tuple[str, str], ...] = ()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.headers.get("Range"))
        responses = self.server.responses
        response = responses.pop(0) if responses else self.server.default
        self.server.requested.set()
        if response.status >= 400:
            return self.send_error(response.status)
        validators = dict(response.validators).values()
        resumed = self.headers.get("Range") and response.resumes and self.headers.get("If-Range") in validators
        first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if resumed else 0
        self.send_response(response.status or (206 if resumed else 200))
        if resumed:
            self.send_header("Content-Range", f"bytes {first}-{len(response.body) - 1}/{len(response.body)}")
        if response.sends_length:
            self.send_header("Content-Length", str(len(response.body) - first))
        for name, value in (("Content-Type", response.content_type), *response.validators, *response.headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(response.body[first:][: response.cut])
        if response.stall:
            self.server.end.wait(10)
        return None

    def handle(self):
        with suppress(ConnectionError):  # the client needs the headers only
            super().handle()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Serves `responses`, then `default`; records the Range header of each request."""
    monkeypatch.setenv("no_proxy", "*")
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.responses, running.default, running.requests = [], Response(), []
    running.end, running.requested = threading.Event(), threading.Event()
    running.url = f"http://127.0.0.1:{running.server_port}/a.pt"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.end.set()
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "a.pt"


@pytest.fixture
def fetch(server, target, monkeypatch):
    def fetch(url=server.url, attempts=5, pause=0.001, timeout=5, check=lambda path: None, **options):
        for name, value in (("ATTEMPTS", attempts), ("FIRST_PAUSE_SECONDS", pause), ("TIMEOUT_SECONDS", timeout)):
            monkeypatch.setattr(f"sagl.utils.download.{name}", value)
        return download(url, target, check=check, **options).read_bytes()

    return fetch


def files(target):
    """The files beside the lock."""
    return [path for path in target.parent.iterdir() if path.suffix != ".lock"]


def interrupt(fetch, server, size=100_000):
    """Receive the first bytes and give up."""
    server.responses = [Response(cut=size)]
    with refused(f"{size} of 300000 bytes"):
        fetch(attempts=1)
    server.requests.clear()


def test_a_download_has_the_served_bytes_and_leaves_nothing_else(fetch, server, target, capsys):
    assert fetch(licence="MIT") == BODY
    assert files(target) == [target]
    assert fetch() == BODY
    assert server.requests == [None]  # an existing file is not downloaded
    shown = capsys.readouterr().err
    assert [part for part in (server.url, "MIT", str(target), "0.3/0.3 MB") if part not in shown] == []


def test_a_file_of_unknown_length_is_downloaded(fetch, server):
    server.default = Response(sends_length=False)
    assert fetch() == BODY


def test_a_file_is_checked_and_synced_before_it_has_its_name(fetch, target, monkeypatch):
    events, replace = [], os.replace
    monkeypatch.setattr("os.fsync", lambda descriptor: events.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr("os.replace", lambda old, new: [events.append(new), replace(old, new)])
    fetch(check=lambda path: events.append(path.read_bytes() == BODY and not target.exists()))
    assert events == [True, len(BODY), target]


def test_a_file_that_fails_its_check_is_deleted_and_downloaded_anew(fetch, server, target):
    def check(path):
        raise UserError("It has other shapes.")

    with refused(server.url, "other shapes", target):
        fetch(check=check)
    assert files(target) == []
    assert fetch() == BODY


def test_of_two_processes_one_downloads_and_the_other_waits_for_it(server, target):
    server.responses = [Response(cut=1000, stall=True)]
    source = "import sys; from pathlib import Path; from sagl.utils.download import download; "
    source += f"download({server.url!r}, Path({str(target)!r}), check=lambda path: None)"
    start = {"args": [sys.executable, "-c", source], "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(**start) as first:
        assert server.requested.wait(30)
        with subprocess.Popen(**start) as second:
            assert "another process" in second.stderr.readline()
            server.end.set()
        first.communicate(timeout=30)
        assert (second.returncode, first.returncode) == (0, 0)
    assert target.read_bytes() == BODY
    assert server.requests == [None, None, "bytes=1000-"]


@pytest.mark.parametrize("validators", [ETAG, DATE])
@pytest.mark.parametrize("stall", [False, True])
def test_after_an_interruption_the_missing_bytes_are_requested(validators, stall, fetch, server):
    server.default = Response(validators=validators)
    server.responses = [Response(cut=100_000, validators=validators, stall=stall)]
    assert fetch(timeout=0.1 if stall else 5) == BODY
    assert server.requests[-1] == "bytes=100000-"


def test_a_download_that_was_given_up_is_resumed_by_the_next_from_the_same_address(fetch, server, target):
    interrupt(fetch, server)
    assert fetch(url=server.url.replace("a.pt", "b.pt")) == BODY  # another file
    assert server.requests == [None]
    target.unlink()
    interrupt(fetch, server)
    assert fetch() == BODY
    assert server.requests == [None, "bytes=100000-"]


def test_a_complete_file_of_a_killed_process_is_not_downloaded_again(fetch, server):
    def check(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(check=check)
    assert fetch() == BODY
    assert server.requests == [None, None]


@pytest.mark.parametrize(
    "default",
    [
        Response(resumes=False),
        Response(validators=()),
        Response(validators=(("ETag", 'W/"one"'),)),
        *(Response(body=body, validators=(("ETag", '"two"'),)) for body in (OTHER, OTHER[:90_000])),
        *(Response(body=body, validators=()) for body in (OTHER, OTHER[:90_000])),
        Response(body=OTHER + OTHER),  # under the old ETag
    ],
)
def test_bytes_of_two_files_are_never_joined(default, fetch, server, target):
    interrupt(fetch, server)
    server.default = default
    assert fetch() == default.body
    assert files(target) == [target]


def test_attempts_with_new_bytes_do_not_count(fetch, server):
    server.responses = [Response(cut=20_000), *[Response(), Response(cut=20_000)] * 10]
    assert fetch(attempts=2) == BODY


def test_pauses_double_until_new_bytes_arrive(fetch, server, monkeypatch):
    pauses = []
    monkeypatch.setattr("sagl.utils.download.time.sleep", pauses.append)
    server.responses = [*[Response(status=503)] * 3, Response(cut=1000), Response(status=500)]
    fetch(pause=1)
    assert pauses == [1, 2, 4, 1, 2]


@pytest.mark.parametrize(
    ("default", "attempts"),
    [
        (Response(status=503), 3),
        (Response(status=429), 3),
        (Response(cut=100_000, resumes=False, validators=()), 4),  # the first attempt has new bytes
        (Response(status=404), 1),
        (Response(status=206), 1),
        (Response(status=403), 1),
        (Response(body=b""), 1),
        (Response(content_type="text/html; charset=utf-8"), 1),
        (Response(headers=(("Content-Encoding", "gzip"),)), 1),
        (Response(status=302, headers=(("Location", "ftp://127.0.0.1/a.pt"),)), 1),
        (Response(status=302, headers=(("Location", "http://[/a.pt"),)), 3),
    ],
)
def test_a_server_without_the_file_is_given_up_at_once_or_after_some_attempts(default, attempts, fetch, server, target):
    server.default = default
    with refused("`url`", server.url, target):
        fetch(attempts=3)
    assert abs(len(server.requests) - attempts) <= (default.cut is not None)
    assert not target.exists()


def test_a_web_page_does_not_delete_the_bytes_received_before_it(fetch, server):
    interrupt(fetch, server)
    server.responses = [Response(content_type="text/html", validators=())]
    with refused("text/html"):
        fetch()
    assert fetch() == BODY
    assert server.requests[-1] == "bytes=100000-"


def test_a_redirect_is_followed_unless_it_leaves_https(fetch, server):
    server.responses = [Response(status=302, headers=(("Location", f"{server.url}?again"),))]
    assert fetch() == BODY
    with pytest.raises(HTTPError, match="redirect to http:"):
        _Redirects().redirect_request(Request("https://a/a"), None, 302, "", {}, "http://a/a")


def test_the_response_of_a_redirect_to_an_invalid_address_is_closed():
    response = io.BytesIO()
    with pytest.raises(ValueError, match="Invalid IPv6"):
        _Redirects().http_error_302(Request("http://a/a"), response, 302, "", {"location": "http://[/a"})
    assert response.closed


def test_without_a_network_the_download_is_given_up_at_once(fetch, target, monkeypatch):
    monkeypatch.setattr("sagl.utils.download.time.sleep", lambda _: pytest.fail("waits"))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a.pt"
    with refused(url, target):
        fetch(url=url)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/a.pt", "file:///etc/passwd", "a.pt"])
def test_other_addresses_are_refused(url, fetch):
    with refused("`url`", url):
        fetch(url=url)


@pytest.mark.parametrize("size", [200_000, 299_999])
def test_a_full_disk_is_reported_and_the_download_resumed_when_there_is_space(size, fetch, server):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with refused("`SAGL_CACHE`", "File too large"):
            fetch()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fetch() == BODY
    assert server.requests[-1] == f"bytes={size}-"


@pytest.mark.parametrize("name", ["cache", "cache/a.pt/x", "cache/a.pt.lock/x"])
def test_a_folder_that_cannot_hold_the_file_is_named(name, fetch, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with refused("`SAGL_CACHE`", "a.pt", tmp_path):
        fetch()
