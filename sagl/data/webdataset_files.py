"""Resolution of shards, given as paths, globs, brace ranges or URLs, to local files."""

import glob
import hashlib
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from webdataset.shardlists import expand_urls

from sagl.errors import UserError, require
from sagl.utils.download import download
from sagl.utils.files import cache_folder, sha256
from sagl.utils.listing import is_hidden

SCHEME = re.compile(r"([A-Za-z][\w+.-]+):")
MAX_NAME_LENGTH = 200
"""Bytes of a file name, which leave room for what is added to it in the cache folder."""
MANIFEST = "shards.json"
"""File beside the shards with the number of images and the sha256 of each; written when all shards are complete."""
BLOCK_SIZE = 512
"""Bytes per block of a tar file, which ends with two blocks of zeros."""


def shard_files(shards: str | Sequence[str], cache: Path, argument: str = "data.shards") -> list[Path]:
    """Return the files of shards, in the order of the names; download those with a URL into `cache` once.

    Args:
        shards: path, folder of .tar files, glob, brace range (`cat-{000000..000163}.tar`), file: or http(s) URL, or a
            list of these. No shell command is run.
        cache: folder for downloads.
        argument: name of `shards` in messages.

    Raises:
        UserError: a file does not exist, cannot be downloaded, or has another scheme.
    """
    names = [shards] if isinstance(shards, str) else list(shards)
    require(bool(names), f"`{argument}` must name at least one shard, got an empty list.")
    return [file for name in names for path in _expand(name, argument) for file in _resolve(path, cache, argument)]


def check_manifest(shard: Path, argument: str = "data.shards") -> None:
    """Compare a shard with its sha256 in the shards.json of `sagl shard`, if that file is beside it.

    Raises:
        UserError: they differ.
    """
    try:
        expected = json.loads(shard.with_name(MANIFEST).read_text(encoding="utf-8"))[shard.name]["sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # there is none, or it is of another program
        return
    require(
        expected == sha256(shard),
        f"`{argument}` must be as sagl shard wrote it, and {shard} differs from its sha256 in {MANIFEST}. Delete the "
        f"damaged one of them, and run sagl shard again.",
    )


def check_tar(file: Path, argument: str = "data.shards") -> None:
    """Check that a file begins like an uncompressed tar file.

    Raises:
        UserError: it does not.
    """
    with file.open("rb") as stream:
        block = stream.read(BLOCK_SIZE)
    if block == bytes(BLOCK_SIZE):  # an empty tar file
        return
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError as error:
        raise UserError(
            f"`{argument}` must be uncompressed tar files, and {file} is not: {error}. Decompress it if it is "
            "compressed."
        ) from error


def _expand(name: str, argument: str) -> list[str]:
    """Expand a brace range."""
    _check_scheme(name, argument)
    if Path(name).exists():
        return [name]
    try:
        expanded: list[str] = expand_urls(name)
    except (ValueError, AssertionError) as error:
        raise UserError(f"`{argument}` must be names or brace ranges like {{0..9}}, got {name!r}: {error}.") from error
    return expanded


def _resolve(name: str, cache: Path, argument: str) -> list[Path]:
    """Return the files of a path, folder, glob or URL."""
    scheme = _check_scheme(name, argument)
    if scheme in ("http", "https"):
        return [download_file(name, cache, argument)]
    path = Path(unquote(urlsplit(name).path) if scheme else name).expanduser()
    if path.is_file():
        return [path]
    files = tar_files(path) if path.is_dir() else [Path(file) for file in sorted(glob.glob(str(path)))]
    require(bool(files), f"`{argument}` must lead to tar files, and there is none at {path}.")
    return files


def tar_files(folder: Path) -> list[Path]:
    """Return the tar files in a folder, sorted by name; hidden ones are left out."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() == ".tar" and not is_hidden(path.name))


def local_path(name: str, argument: str) -> str:
    """Return the path of the local copy if this is an http(s) URL of one file, else the name itself.

    Raises:
        UserError: As `download_file`.
    """
    if not name.lower().startswith(("http:", "https:")) or "{" in name:
        return name
    return str(download_file(name, cache_folder() / "shards", argument))


def download_file(url: str, cache: Path, argument: str) -> Path:
    """Return the local copy of a tar or npz file; download it into `cache` once.

    Raises:
        UserError: The address is not usable, or does not lead to such a file.
    """
    _check_scheme(url, argument)
    name = Path(unquote(urlsplit(url).path)).name
    require(
        url.isascii() and url.isprintable() and name.isprintable() and len(os.fsencode(name)) <= MAX_NAME_LENGTH,
        f"`{argument}` must be an address in ASCII (with % for other characters) whose file name has at most "
        f"{MAX_NAME_LENGTH} printable characters, got {url!r}.",
    )
    check = check_npz if name.lower().endswith(".npz") else partial(check_tar, argument=argument)
    target = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    return download(url, target, check=check, folder_argument="data.cache")


def check_npz(file: Path) -> None:
    """Check that a file is a complete zip archive.

    Raises:
        UserError: It is not.
    """
    require(zipfile.is_zipfile(file), f"it is no npz file: {file.stat().st_size} bytes")


def _check_scheme(name: str, argument: str) -> str:
    """Return the scheme of a URL in lower case, or an empty string for a path."""
    match = SCHEME.match(name)
    scheme = match[1].lower() if match else ""
    require(
        scheme in ("", "file", "http", "https"),
        f"`{argument}` must be paths or file:, http: or https: URLs, got {name!r}. Commands such as pipe: are not run: "
        "write their output to a file. A path with a colon must begin with ./",
    )
    try:
        urlsplit(name if scheme else "")
    except ValueError as error:
        raise UserError(f"`{argument}` must be a valid address, got {name!r}: {error}.") from error
    return scheme
