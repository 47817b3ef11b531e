import os
import random
import resource
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib import request
from urllib.error import URLError

import pytest

from sagl.errors import UserError
from sagl.utils import download as download_module
from sagl.utils.download import download

BODY = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
PAGE = b"\xef\xbb\xbf\n <!DOCTYPE html><title>Please log in</title>" + b" " * 1000


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the server does with one request; by default all that it should."""

    status: int = 0
    body: bytes = BODY
    content_type: str = "application/octet-stream"
    validators: tuple[tuple[str, str], ...] = (("ETag", '"one"'),)
    ranges: bool = True  # reads Range
    if_range: bool = True  # reads If-Range
    cut: int | None = None  # ends the connection after so many bytes of the body
    stall: bool = False  # and before that, is silent for as long as the test lasts
    lie: int = 0  # bytes more that it says it will send
    measured: bool = True  # says how many at all
    redirect: str = ""
    moved: int = 302  # status of a redirection
    more: tuple[tuple[str, str], ...] = ()  # headers
    validates_parts: bool = True  # also says with a part what it is a part of
    silent: bool = False  # ends the connection without a word


class Unreachable:
    """Opens nothing, as where there is no network."""

    def open(self, asked, timeout):
        raise URLError("unreachable")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        answer = self.server.script.pop(0) if self.server.script else self.server.then
        self.server.asked.append(dict(self.headers))
        self.server.heard.set()
        if answer.status:
            self.send_error(answer.status)
        elif not answer.silent:
            self.reply(answer)

    def reply(self, answer):
        first = self.first_byte(answer)
        if first and first >= len(answer.body):
            return self.send_error(416)
        self.send_response(answer.moved if answer.redirect else 206 if first else 200)
        if answer.redirect:
            self.send_header("Location", answer.redirect)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(answer.body) - 1}/{len(answer.body)}")
        if answer.measured:
            self.send_header("Content-Length", str(len(answer.body) - first + answer.lie))
        validators = answer.validators if answer.validates_parts or not first else ()
        for name, value in (("Content-Type", answer.content_type), *validators, *answer.more):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body[first:][: answer.cut])
        if answer.stall:
            self.server.over.wait(10)
        return None

    def first_byte(self, answer):
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        same = condition in dict(answer.validators).values() or not answer.if_range
        return int(asked.removeprefix("bytes=").removesuffix("-")) if asked and same and answer.ranges else 0

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Answers by its script, and then as `then` says; remembers the headers of what it was asked."""
    monkeypatch.setenv("no_proxy", "*")
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.script, running.then, running.asked = [], Answer(), []
    running.over, running.heard = threading.Event(), threading.Event()
    running.url = f"http://127.0.0.1:{running.server_port}/a.pt"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.over.set()
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def fetch(server, tmp_path):
    """Downloads from the server to a.pt, without pauses to speak of."""

    def fetch(**options):
        options = {"check": lambda path: None, "pause_seconds": 0.001, "timeout_seconds": 5, **options}
        return download(server.url, tmp_path / "cache" / "a.pt", **options)

    return fetch


def ranges(server):
    return [headers.get("Range") for headers in server.asked]


def beside(tmp_path):
    """What lies in the cache, without the lock, which stays."""
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")


def refused(fetch, **options):
    """The message of a download that is refused; one line."""
    with pytest.raises(UserError) as error:
        fetch(**options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------ whole, and only once


def test_what_arrives_is_what_was_served_and_nothing_else_is_left(fetch, tmp_path):
    assert fetch() == tmp_path / "cache" / "a.pt"
    assert fetch().read_bytes() == BODY
    assert beside(tmp_path) == ["a.pt"]


def test_a_file_that_is_there_is_not_fetched_and_nothing_is_written(fetch, server, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "a.pt").write_bytes(b"mine")
    assert fetch().read_bytes() == b"mine"
    assert server.asked == []
    assert list((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / "a.pt"]


def test_a_file_of_unknown_length_arrives(fetch, server):
    server.then = Answer(measured=False)
    assert fetch().read_bytes() == BODY


def test_the_whole_file_is_checked_before_it_has_its_name(fetch, tmp_path):
    seen = []
    target = tmp_path / "cache" / "a.pt"
    fetch(check=lambda path: seen.append((path.read_bytes() == BODY, path != target, target.exists())))
    assert seen == [(True, True, False)]


def test_the_bytes_are_on_the_disk_before_they_have_their_name(fetch, tmp_path, monkeypatch):
    done, replace_file, target = [], os.replace, tmp_path / "cache" / "a.pt"
    monkeypatch.setattr("os.fsync", lambda descriptor: done.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr("os.replace", lambda old, new: [done.append(new), replace_file(old, new)])
    fetch()
    assert done.index(len(BODY)) < done.index(target)


def test_a_file_that_its_check_refuses_is_thrown_away_and_fetched_anew(fetch, server, tmp_path):
    def check(path):
        raise UserError(f"{path} has other shapes.")

    said = refused(fetch, check=check)
    assert [part for part in (server.url, "a.pt has other shapes.", "Try again") if part not in said] == []
    assert ".partial" not in said
    assert beside(tmp_path) == []
    assert fetch().read_bytes() == BODY
    assert ranges(server) == [None, None]


def test_a_file_that_was_whole_when_its_process_ended_is_not_fetched_again(fetch, server):
    def check(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(check=check)
    assert fetch().read_bytes() == BODY
    assert len(server.asked) == 1


def test_of_two_processes_one_fetches_and_the_other_waits_and_finds_the_file(server, tmp_path):
    server.script = [Answer(cut=1000, stall=True)]
    source = (
        f"from pathlib import Path; from sagl.utils.download import download; import sys; download({server.url!r}, "
    )
    source += f"Path({str(tmp_path / 'cache' / 'a.pt')!r}), check=lambda path: None, pause_seconds=0.001)"
    start = {"args": [sys.executable, "-c", source], "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(**start) as first:
        assert server.heard.wait(30)
        with subprocess.Popen(**start) as second:
            assert "another process" in second.stderr.readline()
            assert (tmp_path / "cache" / "a.pt.partial").stat().st_size <= 1000
            server.over.set()
        assert (second.returncode, first.wait(30)) == (0, 0)
    assert (tmp_path / "cache" / "a.pt").read_bytes() == BODY
    assert ranges(server) == [None, "bytes=1000-"]


# ------------------------------------------------------------------------------------------------------- resumed


def test_after_a_cut_only_the_rest_is_fetched(fetch, server):
    server.script = [Answer(cut=100_000), Answer(cut=50_000), Answer(cut=0)]
    assert fetch().read_bytes() == BODY
    assert ranges(server) == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]
    assert [headers.get("If-Range") for headers in server.asked] == [None, *['"one"'] * 3]


def test_a_server_that_falls_silent_is_asked_for_the_rest(fetch, server):
    server.script = [Answer(cut=100_000, stall=True)]
    assert fetch(timeout_seconds=0.1).read_bytes() == BODY
    assert ranges(server) == [None, "bytes=100000-"]


def test_a_download_that_was_given_up_is_resumed_by_the_next(fetch, server, tmp_path):
    server.script = [Answer(cut=100_000)]
    assert "100000 of 300000 bytes" in refused(fetch, attempts=1)
    assert beside(tmp_path) == ["a.pt.partial", "a.pt.partial.json"]
    assert fetch().read_bytes() == BODY
    assert ranges(server) == [None, "bytes=100000-"]


def test_a_download_that_was_interrupted_is_resumed_by_the_next(fetch, server):
    def interrupt(done, total):
        if done > 1000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(on_progress=interrupt)
    assert fetch().read_bytes() == BODY
    assert int(ranges(server)[1].strip("bytes=-")) > 1000


def test_a_part_that_says_nothing_of_its_file_goes_on_with_it(fetch, server):
    server.script = [Answer(cut=100_000)]
    server.then = Answer(validates_parts=False)
    assert fetch().read_bytes() == BODY
    assert ranges(server) == [None, "bytes=100000-"]


def test_a_network_that_is_lost_on_the_way_is_asked_again(fetch, server, monkeypatch):
    openers = [download_module._opener(), Unreachable(), download_module._opener()]
    monkeypatch.setattr(download_module, "_opener", lambda: openers.pop(0))
    server.script = [Answer(cut=100_000)]
    assert fetch().read_bytes() == BODY
    assert ranges(server) == [None, "bytes=100000-"]


@pytest.mark.parametrize("memory", ["", '{"url": "http', "[]", "3"])
def test_what_is_half_remembered_is_fetched_anew(memory, fetch, server, tmp_path):
    server.script = [Answer(cut=100_000)]
    refused(fetch, attempts=1)
    (tmp_path / "cache" / "a.pt.partial.json").write_text(memory)
    assert fetch().read_bytes() == BODY
    assert ranges(server) == [None, None]


def test_a_server_that_ignores_ranges_is_read_from_the_beginning(fetch, server):
    server.script = [Answer(cut=100_000), Answer(ranges=False)]
    assert fetch().read_bytes() == BODY
    assert ranges(server) == [None, "bytes=100000-"]


@pytest.mark.parametrize("reads_if_range", [True, False])
@pytest.mark.parametrize("kind", ["ETag", "Last-Modified"])
@pytest.mark.parametrize("body", [OTHER, OTHER[:200_000], OTHER[:90_000]])
def test_two_files_are_never_spliced(body, kind, reads_if_range, fetch, server):
    before, after = {"ETag": ('"one"', '"two"'), "Last-Modified": ("yesterday", "today")}[kind]
    server.script = [Answer(cut=100_000, validators=((kind, before),))]
    server.then = Answer(body=body, validators=((kind, after),), if_range=reads_if_range)
    assert fetch().read_bytes() == body
    assert ranges(server)[:2] == [None, "bytes=100000-"]


@pytest.mark.parametrize("body", [OTHER[:200_000], OTHER + OTHER])
def test_a_range_of_another_length_is_never_spliced(body, fetch, server):
    server.script = [Answer(cut=100_000)]
    server.then = Answer(body=body)  # under the old ETag
    assert fetch().read_bytes() == body


def test_bytes_that_nothing_identifies_are_not_taken_for_those_before_them(fetch, server):
    server.script = [Answer(cut=100_000), Answer(body=OTHER, cut=50_000, validators=(), ranges=False)]
    assert fetch().read_bytes() == BODY


@pytest.mark.parametrize("validators", [(), (("ETag", 'W/"one"'),)])
def test_bytes_that_nothing_identifies_are_neither_resumed_nor_kept(validators, fetch, server, tmp_path):
    server.script = [Answer(cut=100_000, validators=validators)] * 2
    refused(fetch, attempts=2)
    assert ranges(server) == [None, None]
    assert beside(tmp_path) == []


def test_bytes_of_another_address_are_not_resumed(fetch, server, tmp_path):
    server.script = [Answer(cut=100_000)]
    refused(fetch, attempts=1)
    elsewhere = server.url.replace("a.pt", "b.pt")
    assert download(elsewhere, tmp_path / "cache" / "a.pt", check=lambda path: None).read_bytes() == BODY
    assert ranges(server) == [None, None]


# --------------------------------------------------------------------------------------------------- given up


def test_attempts_that_bring_bytes_do_not_count_together(fetch, server):
    server.script = [Answer(cut=20_000)] * 10
    assert fetch(attempts=2).read_bytes() == BODY


def test_a_server_that_always_ends_at_the_same_byte_is_given_up(fetch, server):
    server.then = Answer(cut=100_000, ranges=False)
    assert "100000 of 300000 bytes" in refused(fetch, attempts=3)
    assert len(server.asked) == 3


def test_a_server_that_has_less_than_it_says_is_given_up(fetch, server, tmp_path):
    server.then = Answer(lie=10)
    assert "`url`" in refused(fetch, attempts=3)
    assert len(server.asked) <= 6
    assert "a.pt" not in beside(tmp_path)


def test_no_more_is_taken_than_the_server_says(fetch, server):
    server.then = Answer(lie=-10)
    assert fetch().read_bytes() == BODY[:-10]


def test_pauses_grow_as_long_as_nothing_comes(fetch, server, monkeypatch):
    pauses = []
    monkeypatch.setattr("sagl.utils.download.time.sleep", pauses.append)
    server.script = [*[Answer(status=503)] * 3, Answer(cut=1000), Answer(status=500)]
    fetch(pause_seconds=1)
    assert pauses == [1, 2, 4, 1, 2]


@pytest.mark.parametrize("fault", [Answer(status=500), Answer(status=503), Answer(status=429), Answer(silent=True)])
def test_a_server_in_trouble_is_asked_again_and_then_given_up(fault, fetch, server, tmp_path):
    server.script = [fault] * 2
    assert fetch().read_bytes() == BODY
    (tmp_path / "cache" / "a.pt").unlink()
    server.then, server.asked = fault, []
    message = refused(fetch, attempts=3)
    assert [part for part in ("`url`", server.url, str(tmp_path / "cache" / "a.pt")) if part not in message] == []
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_file_that_is_not_there_is_said_at_once(status, fetch, server, tmp_path):
    server.then = Answer(status=status)
    assert f"answered {status}" in refused(fetch)
    assert len(server.asked) == 1
    assert beside(tmp_path) == []


def test_without_a_network_the_way_out_is_said_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a.pt"
    message = refused(lambda: download(url, tmp_path / "a.pt", check=lambda path: None, pause_seconds=3600))
    assert f"fetch {url} elsewhere and put it at {tmp_path / 'a.pt'}" in message


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/a.pt", "file:///etc/hostname", "a.pt", ""])
def test_addresses_of_other_kinds_are_refused(url, tmp_path):
    with pytest.raises(UserError, match="`url` must be an http or https address"):
        download(url, tmp_path / "a.pt", check=lambda path: None)


@pytest.mark.parametrize("place", ["ftp://127.0.0.1:9/a.pt", "file:///etc/hostname"])
def test_a_redirection_to_another_kind_of_address_is_not_followed(place, fetch, server, tmp_path):
    server.then = Answer(redirect=place)
    message = refused(fetch)
    assert "unknown url type" in message or "not allowed" in message
    assert beside(tmp_path) == []


def test_a_redirection_is_followed_and_resumed(fetch, server):
    moved = Answer(redirect=server.url.replace("a.pt", "b.pt"))
    server.script = [moved, Answer(cut=100_000), moved]
    assert fetch().read_bytes() == BODY
    assert ranges(server) == [None, None, "bytes=100000-", "bytes=100000-"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", ["http://[bad/", "http://127.0.0.1:port/"])
def test_a_redirection_to_no_address_is_a_request_that_failed(place, status, fetch, server, tmp_path):
    server.then = Answer(redirect=place, moved=status)
    assert "`url` must be within reach" in refused(fetch, attempts=2)
    assert beside(tmp_path) == []


def test_a_redirection_in_circles_is_said_in_one_line(fetch, server):
    server.then = Answer(redirect=server.url)
    assert "infinite loop" in refused(fetch)


def test_a_redirection_from_https_to_http_is_refused(server, tmp_path, monkeypatch):
    class Downgrading:
        def open(self, asked, timeout):
            return request.urlopen(asked.full_url.replace("https:", "http:"), timeout=timeout)

    monkeypatch.setattr(download_module, "_opener", Downgrading)
    url = server.url.replace("http:", "https:")
    said = refused(lambda: download(url, tmp_path / "cache" / "a.pt", check=lambda path: None))
    assert f"`url` must stay with https, and {url} leads to {server.url}." in said
    assert beside(tmp_path) == []


# -------------------------------------------------------------------------------------- pages, and other wrappings


def test_the_file_is_asked_for_as_it_is(fetch, server):
    fetch()
    assert [headers["Accept-Encoding"] for headers in server.asked] == ["identity"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(more=(("Content-Encoding", "gzip"),)), "answered with gzip of it"),
        (Answer(status=204), "is empty"),
        (Answer(body=b""), "is empty"),
        (Answer(body=b"", measured=False), "is empty"),
        (Answer(content_type="text/html; charset=utf-8"), "web page"),
        (Answer(body=PAGE), "web page"),
    ],
)
def test_what_is_not_the_file_as_it_is_is_refused_at_once(answer, said, fetch, server, tmp_path):
    server.then = answer
    assert said in refused(fetch)
    assert len(server.asked) == 1
    assert beside(tmp_path) == []


def test_an_answer_that_is_cut_before_its_first_byte_is_not_taken_for_an_empty_one(fetch, server):
    server.script = [Answer(cut=0)]
    assert fetch().read_bytes() == BODY


def test_a_web_page_costs_none_of_the_bytes_before_it(fetch, server):
    server.script = [Answer(cut=100_000), Answer(body=PAGE, validators=())]
    assert "web page" in refused(fetch)
    assert fetch().read_bytes() == BODY
    assert ranges(server) == [None, "bytes=100000-", "bytes=100000-"]


# -------------------------------------------------------------------------------------------------------- disks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_in_one_line_and_nothing_is_left(fetch, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "a.pt.partial").symlink_to("/dev/full")
    message = refused(fetch)
    assert [part for part in ("`SAGL_CACHE`", "No space left", str(tmp_path)) if part not in message] == []
    assert beside(tmp_path) == []


@pytest.mark.parametrize("room", [200_000, 299_999])
def test_bytes_that_found_room_are_resumed_when_there_is_more(room, fetch, server):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        message = refused(fetch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in message
    assert fetch().read_bytes() == BODY
    assert ranges(server) == [None, f"bytes={room}-"]


@pytest.mark.parametrize("taken", ["cache", "cache/a.pt.partial/x", "cache/a.pt/x", "cache/a.pt.lock/x"])
def test_a_folder_that_cannot_hold_the_file_is_said_in_one_line(taken, fetch, tmp_path):
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken).touch()
    assert "`SAGL_CACHE` must be a folder that can hold a.pt" in refused(fetch)


# ----------------------------------------------------------------------------------------------------- progress


def test_progress_goes_from_what_is_there_to_the_whole(fetch, server):
    told = []
    server.script = [Answer(cut=100_000)]
    refused(fetch, attempts=1)
    fetch(on_progress=lambda done, total: told.append((done, total)))
    assert told[0] == (100_000, len(BODY))
    assert told[-1] == (len(BODY), len(BODY))
    assert told == sorted(told)


def test_progress_of_an_unknown_length_is_out_of_nothing(fetch, server):
    told = []
    server.then = Answer(measured=False)
    fetch(on_progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(BODY), 0)
