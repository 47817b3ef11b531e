"""Files under a folder, in the form in which people have them: with symbolic links, hidden files and system folders."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sagl.errors import UserError, require

SYSTEM_NAMES = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
SYSTEM_NAMES |= {"Thumbs.db", "desktop.ini"}
"""Files and folders that macOS, Windows, Linux and network storage put between those of the user."""


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is not the user's: its name begins with a dot, or is one of `SYSTEM_NAMES`."""
    return name.startswith(".") or name in SYSTEM_NAMES


@dataclass(kw_only=True)
class Listing:
    """Names of the entries under a folder, relative to it, with / between the parts."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    """Hidden files and folders; what is in such a folder is not listed."""


def list_folder(root: Path, argument: str) -> Listing:
    """List everything under a folder, sorted. Symbolic links are followed.

    Args:
        root: An existing folder.
        argument: Name of the parameter in messages.

    Raises:
        UserError: A folder cannot be read, or a link is broken or leads to a folder that contains it.
    """
    listing = Listing()
    try:
        for entry, name in _walk(root, "", (), argument):
            kind = listing.hidden if is_hidden(entry.name) else listing.folders if entry.is_dir() else listing.files
            kind.append(name)
    except OSError as error:
        raise UserError(
            f"`{argument}` must be a folder that can be read, and {error.filename or root} cannot: {error.strerror}. "
            "Change its permissions, or remove it."
        ) from error
    for names in (listing.files, listing.folders, listing.hidden):
        names.sort()
    return listing


def _walk(
    folder: Path | str, prefix: str, parents: tuple[str, ...], argument: str
) -> Iterator[tuple["os.DirEntry[str]", str]]:
    """Yield the entries under a folder with their names; `parents` are the real paths of the folders above."""
    real_path = os.path.realpath(folder)
    require(
        real_path not in parents,
        f"`{argument}` must not contain links to folders above them, and {folder} leads to {real_path}. Remove it.",
    )
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            require(
                is_hidden(entry.name) or entry.is_dir() or entry.is_file(),
                f"`{argument}` must consist of files and folders, and {entry.path} is a broken link or a device. "
                "Repair or remove it.",
            )
            yield entry, name
            if not is_hidden(entry.name) and entry.is_dir():
                yield from _walk(entry.path, f"{name}/", (*parents, real_path), argument)
