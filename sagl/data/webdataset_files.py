"""Where shards are: paths, globs, brace ranges and addresses, as files on this machine."""

import glob
import hashlib
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from webdataset.shardlists import expand_urls

from sagl.errors import UserError, require
from sagl.utils.download import download
from sagl.utils.download_progress import progress_bar

SCHEME = re.compile(r"([A-Za-z][\w+.-]+):")
BLOCK = 512
"""Bytes; a tar consists of such blocks, and ends with two of zeros."""


def shard_files(shards: str | Sequence[str], cache: Path) -> list[Path]:
    """The files that are meant, in the order of the names; those of the network are fetched into `cache` once.

    Args:
        shards: paths, folders of .tar files, globs, brace ranges (`cat-{000000..000163}.tar`), file: and http(s):
            addresses, or a list of these.
        cache: folder for what is fetched.

    Raises:
        UserError: one leads nowhere, cannot be fetched or is of another kind: no shell command is run.
    """
    given = [shards] if isinstance(shards, str) else list(shards)
    require(bool(given), "`data.shards` must name at least one shard, got an empty list.")
    return [file for name in given for one in _expanded(name) for file in _files(one, cache)]


def require_tar(file: Path) -> None:
    """Refuse a file that does not begin as an uncompressed tar does.

    Raises:
        UserError: names it.
    """
    with file.open("rb") as stream:
        head = stream.read(BLOCK)
    if head == bytes(BLOCK):  # one without members
        return
    try:
        tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError as error:
        raise UserError(
            f"`data.shards` must be uncompressed tar files, and {file} is none: {error}. Unpack it if it is compressed."
        ) from error


def _expanded(name: str) -> list[str]:
    """A brace range as all that it stands for."""
    _require_allowed(name)
    if Path(name).exists():
        return [name]
    try:
        expanded: list[str] = expand_urls(name)
    except (ValueError, AssertionError) as error:
        raise UserError(f"`data.shards` must be names or brace ranges like {{0..9}}, got {name!r}: {error}.") from error
    return expanded


def _files(name: str, cache: Path) -> Iterator[Path]:
    """One name as files."""
    scheme = _require_allowed(name)
    if scheme in ("http", "https"):
        yield _fetched(name, cache)
        return
    path = Path(unquote(urlsplit(name).path) if scheme else name).expanduser()
    if path.is_file():
        yield path
        return
    found = sorted(glob.glob(str(path / "*.tar" if path.is_dir() else path)))
    require(bool(found), f"`data.shards` must lead to tar files, and there is none at {path}.")
    yield from map(Path, found)


def _require_allowed(name: str) -> str:
    """The scheme of an address, in lower case; empty for a path."""
    found = SCHEME.match(name)
    scheme = found[1].lower() if found else ""
    require(
        scheme in ("", "file", "http", "https"),
        f"`data.shards` must be paths, file:, http: or https: addresses, got {name!r}. Commands are never run: write "
        "what they print into a file; a path with a colon begins with ./",
    )
    return scheme


def _fetched(url: str, cache: Path) -> Path:
    """A shard of the network, downloaded unless it is there."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{Path(unquote(urlsplit(url).path)).name}"
    target = cache / name
    if not target.is_file():
        print(f"Fetching {url} to {target}", file=sys.stderr, flush=True)
        with progress_bar(name) as on_progress:
            download(url, target, check=require_tar, on_progress=on_progress, folder_argument="data.cache")
    return target
