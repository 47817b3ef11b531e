"""Downloads that resume after an interruption, are checked before use, and run in one process at a time.

Beside a file `a.pt` lie `a.pt.lock` and, until it is complete, `a.pt.ID.partial`. ID depends on the address, on the
server's ETag or modification time and on the length, so that bytes of two files are never joined.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from sagl.errors import UserError, require
from sagl.utils.progress import ProgressReporter

CHUNK = 1 << 20
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
TIMEOUT_SECONDS = 30.0
"""Longest silence of the server."""
ATTEMPTS = 5
"""Number of failures in a row, without a new byte, after which to give up."""
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 30.0
"""The pause after a failure is doubled at each further one."""

OnProgress = Callable[[int, int | None], None]
"""Receives the number of bytes so far and in total; None if the server does not say."""


def download(
    url: str,
    target: Path,
    *,
    check: Callable[[Path], None],
    licence: str = "",
    folder_argument: str = "SAGL_CACHE",
) -> Path:
    """Download a file to `target` unless it exists; show source and progress on stderr.

    Args:
        url: http or https address. Redirects from https to http are refused.
        target: Path of the file; its folder is created.
        check: Called with the complete file before it gets its name; raises UserError for a wrong file.
        licence: Licence to show.
        folder_argument: Name of the parameter or variable that sets the folder, for messages.

    Raises:
        UserError: The file cannot be downloaded, is not the expected one, or cannot be stored.
    """
    require(urlsplit(url).scheme in ("http", "https"), f"`url` must be an http or https address, got {url!r}.")
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target):
            if target.is_file():  # another process has downloaded it meanwhile
                return target
            print(f"Downloading {url}{licence and f' ({licence} licence)'} to {target}", file=sys.stderr, flush=True)
            with ProgressReporter(target.name, unit="bytes") as progress:
                partial = _fetch(url, target, progress.update)
            _check(partial, check)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, target)
    except _DownloadError as error:
        raise UserError(
            f"`url` must lead to {target.name}, but {url} does not: {error}. "
            f"Try again, or fetch it elsewhere and put it at {target}."
        ) from error
    except OSError as error:
        raise UserError(
            f"`{folder_argument}` must be a folder that can hold {target.name}, but {target.parent} cannot: "
            f"{error.strerror or error}. Free some space there, or set `{folder_argument}` to another folder."
        ) from error
    return target


class _DownloadError(Exception):
    def __init__(self, reason: object, *, transient: bool = False) -> None:
        super().__init__(" ".join(str(reason).split()).removesuffix("."))
        self.transient = transient


class _Redirects(request.HTTPRedirectHandler):
    """Follows redirects to https, or from http to http."""

    def http_error_302(self, req: request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:  # noqa: ANN401
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except BaseException:  # such as an invalid address, for which urllib leaves the response open
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req: request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:  # noqa: ANN401
        if urlsplit(newurl).scheme not in ("https", req.type):
            raise HTTPError(req.full_url, code, f"redirect to {newurl}", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(url: str, target: Path, on_progress: OnProgress) -> Path:
    """Request the missing bytes until the partial file is complete, and return its path."""
    failures, num_bytes = 0, _partial_size(target)
    while True:
        try:
            return _request(url, target, on_progress)
        except _DownloadError as error:
            offline = failures == 0 and type(error.__cause__) is URLError
            failures = 1 if _partial_size(target) > num_bytes else failures + 1
            num_bytes = max(num_bytes, _partial_size(target))
            if offline or not error.transient or failures >= ATTEMPTS:
                raise
        time.sleep(min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (failures - 1)))


def _request(url: str, target: Path, on_progress: OnProgress) -> Path:
    """Request the missing bytes once, append them to the partial file, and return its path."""
    with _open(url) as response:
        if response.status != 200:
            raise _DownloadError(f"the server answered with status {response.status} instead of the whole file")
        length, etag = response.length, response.headers.get("ETag", "")
        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")  # RFC 9110, 13.1.5
        identity = hashlib.sha256(f"{url} {validator} {length}".encode()).hexdigest()[:12]
        partial = target.with_name(f"{target.name}.{identity}.partial")
        for other in _partials(target):
            if other != partial or validator is None or length is None:  # cannot be resumed
                other.unlink()
        done = partial.stat().st_size if partial.exists() else 0
        if done == 0:
            _append(response, partial, 0, length, on_progress)
    if length is not None and 0 < done < length:
        with _open(url, {"Range": f"bytes={done}-", "If-Range": str(validator)}) as response:
            if response.headers.get("Content-Range") != f"bytes {done}-{length - 1}/{length}":
                partial.unlink()
                raise _DownloadError("the server cannot resume the download, or the file has changed", transient=True)
            _append(response, partial, done, length, on_progress)
    return partial


def _open(url: str, headers: dict[str, str] | None = None) -> HTTPResponse:
    headers = {"User-Agent": "sagl", "Accept-Encoding": "identity", **(headers or {})}
    with _network_errors():
        response: HTTPResponse = request.build_opener(_Redirects).open(
            request.Request(url, headers=headers), None, TIMEOUT_SECONDS
        )
    kind, encoding = response.headers.get_content_type(), response.headers.get("Content-Encoding", "identity")
    if kind == "text/html" or encoding != "identity":
        response.close()
        raise _DownloadError(f"the server sent {kind} in the encoding {encoding} (the network may require a login)")
    return response


def _append(response: HTTPResponse, partial: Path, done: int, length: int | None, on_progress: OnProgress) -> None:
    """Append the body of a response to the first `done` bytes."""
    with partial.open("ab") as file:
        while True:
            on_progress(done, length)
            with _network_errors():
                piece = response.read1(CHUNK if length is None else min(CHUNK, length - done))
            if not piece:
                break
            file.write(piece)
            file.flush()  # so that a killed process can be resumed
            done += len(piece)
    if done < (length or 0):
        raise _DownloadError(f"the connection ended after {done} of {length} bytes", transient=True)
    if done == 0:
        raise _DownloadError("the file is empty")


@contextmanager
def _network_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, HTTPException, ValueError) as error:
        permanent = isinstance(error, HTTPError) and error.code not in TRANSIENT_STATUSES
        if isinstance(error, HTTPError):
            error.close()
        raise _DownloadError(str(error) or type(error).__name__, transient=not permanent) from error


def _check(partial: Path, check: Callable[[Path], None]) -> None:
    try:
        check(partial)
    except UserError as error:
        partial.unlink()
        raise _DownloadError(error) from error


def _partials(target: Path) -> list[Path]:
    prefix = f"{target.name}."
    return [path for path in target.parent.glob("*.partial") if path.name.startswith(prefix)]


def _partial_size(target: Path) -> int:
    return sum(path.stat().st_size for path in _partials(target))


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting for another process that downloads {target.name}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
