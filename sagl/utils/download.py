"""Files from the network, whole and checked or not at all: resumed after a cut, one process at a time.

Beside a file `a.pt` lie `a.pt.partial` (bytes so far), `a.pt.partial.json` (what they are the beginning of),
`a.pt.lock` (empty; it stays, since removing it would let two processes in) and `a.pt.sha256`.
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from email.message import Message
from http.client import HTTPException, HTTPMessage, HTTPResponse
from io import FileIO
from pathlib import Path
from typing import IO, Any
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from sagl.errors import UserError, require
from sagl.utils.download_progress import Progress, no_progress

CHUNK = 1 << 20
"""Bytes asked of the socket at once."""
WORTH_ANOTHER_TRY = (408, 429, 500, 502, 503, 504)
"""HTTP statuses of servers that are busy rather than without the file."""
LONGEST_PAUSE_SECONDS = 30.0


class Redirections(request.HTTPRedirectHandler):
    """urllib's own, which leaves the connection open where the new address is none."""

    def http_error_302(self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage) -> Any:  # noqa: ANN401 (urllib's own)
        """Ask at the new address.

        Raises:
            HTTPError: there is none.
        """
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError as error:
            raise HTTPError(req.full_url, code, str(error), headers, fp) from error

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


HANDLERS: tuple[Callable[[], request.BaseHandler], ...] = (
    *(request.ProxyHandler, request.UnknownHandler, request.HTTPHandler, request.HTTPSHandler),
    *(request.HTTPDefaultErrorHandler, Redirections, request.HTTPErrorProcessor),
)


def download(
    url: str,
    target: Path,
    *,
    check: Callable[[Path], None],
    on_progress: Progress = no_progress,
    timeout_seconds: float = 30,
    attempts: int = 5,
    pause_seconds: float = 1,
    folder_argument: str = "SAGL_CACHE",
) -> Path:
    """Fetch a file to `target`, unless it is there.

    Args:
        url: http or https.
        target: a file in the cache folder; the folder is made where it is missing.
        check: told the whole file before it gets its name; raises UserError if it is not what it should be.
        on_progress: told of every piece that comes.
        timeout_seconds: longest silence of the server.
        attempts: how many in a row may fail without a byte more than before.
        pause_seconds: before the second of them; twice as long before each one after, up to half a minute.
        folder_argument: what the user calls the folder of `target`.

    Returns:
        `target`.

    Raises:
        UserError: no such file, no network, a page instead of a file, no room; or what `check` raises.
    """
    require(urlsplit(url).scheme in ("http", "https"), f"`url` must be an http or https address, got {url!r}.")
    if target.is_file():
        return target
    transfer = _Transfer(
        url=url,
        target=target,
        on_progress=on_progress,
        timeout_seconds=timeout_seconds,
        folder_argument=folder_argument,
    )
    with _disk(transfer):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(transfer):
        if not target.is_file():  # another process may have brought it meanwhile
            with _without_leftovers(transfer):
                _fetch(transfer, attempts, pause_seconds)
            _publish(transfer, check)
    return target


# ------------------------------------------------------------------------------------------------- attempts


@dataclass(frozen=True, kw_only=True)
class _Transfer:
    url: str
    target: Path
    on_progress: Progress
    timeout_seconds: float
    folder_argument: str

    @property
    def partial(self) -> Path:
        return self.target.with_name(self.target.name + ".partial")

    @property
    def memory(self) -> Path:
        return self.target.with_name(self.target.name + ".partial.json")

    @property
    def way_out(self) -> str:
        return f"Try again, or fetch {self.url} elsewhere and put it at {self.target}."


@dataclass(frozen=True, kw_only=True)
class _Beginning:
    """What the bytes of a partial file are the beginning of."""

    url: str
    validator: str
    length: int


class _AttemptError(Exception):
    """An attempt failed, and another one may not."""


class _UnreachableError(_AttemptError):
    """There was no server to talk to."""


def _fetch(transfer: _Transfer, attempts: int, pause_seconds: float) -> None:
    """Try until all bytes are in the partial file; `attempts` in a row may bring nothing new."""
    failed, most = 0, _kept(transfer)
    while True:
        try:
            return _attempt(transfer)
        except _AttemptError as error:
            offline = isinstance(error, _UnreachableError) and failed == 0
            failed = failed + 1 if _kept(transfer) <= most else 1
            if offline or failed >= attempts:
                raise _given_up(transfer, error) from error
        most = max(most, _kept(transfer))
        time.sleep(min(LONGEST_PAUSE_SECONDS, pause_seconds * 2 ** (failed - 1)))


@contextmanager
def _without_leftovers(transfer: _Transfer) -> Iterator[None]:
    """After a failure, keep bytes only where they can be resumed."""
    try:
        yield
    except BaseException:
        if _beginning(transfer) is None:
            _forget(transfer)
        raise


def _given_up(transfer: _Transfer, error: object) -> UserError:
    said = " ".join(str(error).split())  # urllib's own have several lines
    return UserError(f"`url` must be within reach, and {transfer.url} is not: {said}. {transfer.way_out}")


def _attempt(transfer: _Transfer) -> None:
    """Ask once for what is missing, and append it."""
    begun, kept = _beginning(transfer), _kept(transfer)
    if begun and kept == begun.length:  # an earlier process ended between the last byte and the new name
        return
    with _ask(transfer, begun, kept) as response:
        _refuse_wrappings(transfer, response)
        if begun and response.status == 206:
            if not _continues(response, begun, kept):
                _forget(transfer)
                raise _AttemptError("the file on the server has changed")
            _receive(transfer, response, kept, begun.length)
        else:
            total, begun = response.length, _beginning_of(transfer, response)
            with _network():
                head = response.read(64)
            _refuse_pages(transfer, response, head)
            require(bool(head or total), f"`url` must lead to a file, and {transfer.url} is empty. {transfer.way_out}")
            _begin(transfer, begun, head)
            _receive(transfer, response, len(head), total)


def _ask(transfer: _Transfer, begun: _Beginning | None, kept: int) -> HTTPResponse:
    """A response of status 200 or 206."""
    headers = {"User-Agent": "sagl", "Accept-Encoding": "identity"}
    if begun:
        headers |= {"Range": f"bytes={kept}-", "If-Range": begun.validator}
    asked = request.Request(transfer.url, headers=headers)
    with _network():
        try:
            response: HTTPResponse = _opener().open(asked, timeout=transfer.timeout_seconds)
            return response
        except HTTPError as error:
            with error:
                raise _refusal(transfer, error) from error
        except URLError as error:
            raise _UnreachableError(str(error.reason)) from error


def _refusal(transfer: _Transfer, error: HTTPError) -> Exception:
    """Whether a status is worth another attempt."""
    said = f"the server answered {error.code} {error.reason}"
    if error.code == 416:  # fewer bytes there than here
        _forget(transfer)
    again = error.code in (416, *WORTH_ANOTHER_TRY)
    return _AttemptError(said) if again else _given_up(transfer, said)


@contextmanager
def _network() -> Iterator[None]:
    """Turn a cut, a silence or an address that is none into an attempt that failed."""
    try:
        yield
    except (OSError, HTTPException) as error:
        raise _AttemptError(str(error) or type(error).__name__) from error


def _opener() -> request.OpenerDirector:
    """Opens http and https alone, redirections included: urllib's own would follow one to ftp."""
    opener = request.OpenerDirector()
    for handler in HANDLERS:
        opener.add_handler(handler())
    return opener


def _refuse_wrappings(transfer: _Transfer, response: HTTPResponse) -> None:
    """Bytes that are compressed though nobody asked for it, or that came without the protection that was asked for."""
    coding = response.headers.get("Content-Encoding", "identity")
    require(
        coding.lower() == "identity",
        f"`url` must lead to a file as it is, and {transfer.url} answered with {coding} of it. {transfer.way_out}",
    )
    asked, came = urlsplit(transfer.url).scheme, urlsplit(response.url).scheme
    require(
        asked != "https" or came == "https",
        f"`url` must stay with https, and {transfer.url} leads to {response.url}. {transfer.way_out}",
    )


def _refuse_pages(transfer: _Transfer, response: HTTPResponse, head: bytes) -> None:
    """Networks with a login page answer every address with it, and with status 200."""
    begins = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!doctype html", b"<html"))
    if begins or response.headers.get_content_type() == "text/html":
        raise UserError(
            f"`url` must lead to a file, and {transfer.url} answered with a web page: does the network ask for a "
            f"login? {transfer.way_out}"
        )


def _begin(transfer: _Transfer, begun: _Beginning | None, head: bytes) -> None:
    """Start the partial file anew."""
    with _disk(transfer):
        transfer.memory.unlink(missing_ok=True)
        transfer.partial.write_bytes(head)
        if begun:
            transfer.memory.write_text(json.dumps(asdict(begun)))  # half of it reads as nothing


def _receive(transfer: _Transfer, response: HTTPResponse, done: int, total: int | None) -> None:
    """Append the rest of the body to the first `done` bytes, piece by piece as it comes."""
    with _disk(transfer):
        file = transfer.partial.open("ab", buffering=0)  # a killed process leaves all that came
    with file:
        transfer.on_progress(done, total or 0)
        while piece := _read(response, CHUNK if total is None else min(CHUNK, total - done)):
            with _disk(transfer):
                _write_all(file, piece)
            done += len(piece)
            transfer.on_progress(done, total or 0)
    if total is not None and done < total:
        raise _AttemptError(f"the connection ended after {done} of {total} bytes")


def _read(response: HTTPResponse, most: int) -> bytes:
    """What has come, as soon as something has: nothing is lost if the rest never comes."""
    with _network():  # most is bytes left: early releases of Python 3.11 do not count those of read1
        return response.read1(most) if most else b""


def _write_all(file: FileIO, piece: bytes) -> None:
    while piece:
        piece = piece[file.write(piece) :]


def _publish(transfer: _Transfer, check: Callable[[Path], None]) -> None:
    """Check the whole file and give it its name."""
    try:
        check(transfer.partial)
    except UserError as error:
        _forget(transfer)
        said = str(error).replace(str(transfer.partial), transfer.target.name)
        raise UserError(
            f"`url` must lead to the file that is wanted, and {transfer.url} brought another: {said} {transfer.way_out}"
        ) from error
    with _disk(transfer):
        _sync(transfer.partial)
        os.replace(transfer.partial, transfer.target)
        transfer.memory.unlink(missing_ok=True)
    with suppress(OSError):  # not every file system has this for folders
        _sync(transfer.target.parent)


# ------------------------------------------------------------------------------------- what a partial file is


def _validator(headers: Message) -> str | None:
    """What If-Range takes: a strong ETag, else the time of the last change (RFC 9110, 13.1.5)."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")


def _beginning_of(transfer: _Transfer, response: HTTPResponse) -> _Beginning | None:
    """What an unread whole answer begins; None if it could not be resumed."""
    validator = _validator(response.headers)
    if response.length is None or validator is None:
        return None
    return _Beginning(url=transfer.url, validator=validator, length=response.length)


def _continues(response: HTTPResponse, begun: _Beginning, kept: int) -> bool:
    """Whether a partial answer goes on with the same file; some servers do not read If-Range."""
    span = response.headers.get("Content-Range", "")
    kind = "ETag" if begun.validator.startswith('"') else "Last-Modified"
    unchanged = response.headers.get(kind, begun.validator) == begun.validator
    return unchanged and span.startswith(f"bytes {kept}-") and span.endswith(f"/{begun.length}")


def _beginning(transfer: _Transfer) -> _Beginning | None:
    """What the partial file is the beginning of; None if it cannot be resumed, or there is none."""
    try:
        begun = _Beginning(**json.loads(transfer.memory.read_text()))
        fits = begun.url == transfer.url and 0 < transfer.partial.stat().st_size <= begun.length
    except (OSError, ValueError, TypeError):
        return None
    return begun if fits else None


def _kept(transfer: _Transfer) -> int:
    """Bytes that can be resumed."""
    return transfer.partial.stat().st_size if _beginning(transfer) else 0


def _forget(transfer: _Transfer) -> None:
    with suppress(OSError):
        transfer.partial.unlink(missing_ok=True)
        transfer.memory.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------- disk


@contextmanager
def _disk(transfer: _Transfer) -> Iterator[None]:
    """Turn a full, closed or missing disk into one line."""
    try:
        yield
    except OSError as error:
        folder, argument = transfer.target.parent, transfer.folder_argument
        raise UserError(
            f"`{argument}` must be a folder that can hold {transfer.target.name}, and {folder} cannot: "
            f"{error.strerror or error}. Make room there, or set {argument} to another folder."
        ) from error


@contextmanager
def _alone(transfer: _Transfer) -> Iterator[None]:
    """Wait until no other process fetches the same file, and keep others waiting."""
    with _disk(transfer):
        lock = os.open(transfer.target.with_name(transfer.target.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with _disk(transfer):
            _lock(lock, transfer.target)
        yield
    finally:
        os.close(lock)


def _lock(lock: int, target: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Waiting for another process that fetches {target.name}", file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
