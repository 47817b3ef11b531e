"""Folders of images. Labels come from the sub-folders, as in ImageNet's training split, or from a CSV file."""

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from sagl.data.image_data import NO_LABEL, ImageDataModule, ImageSource
from sagl.errors import UserError, require
from sagl.utils.listing import Listing, list_folder

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
"""Suffixes of image files, in lower case; the case of a file's suffix does not matter."""
WHOLE_NUMBER = re.compile(r"[0-9]{1,9}(\.0*)?")
"""Label that is a class number. Tables of numbers with gaps are often written as 1.0, 2.0, …"""
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)|nan", re.IGNORECASE)
"""Label that is not the name of a class."""


class FileNames(Sequence[str]):
    """File names as one block of bytes.

    Separate strings have reference counts, and counting copies the memory of a list of them into every worker process.
    """

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.content = b"".join(encoded)
        self.lengths = np.array([len(name) for name in encoded], dtype=np.int64)
        self.ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        end = self.ends[index]
        return os.fsdecode(self.content[end - self.lengths[index] : end])


class FolderImageSource(ImageSource):
    """Image source of all images under a folder, sorted by path.

    Labels that are whole numbers are used as they are. Otherwise a label is the position of the class in the sorted
    class names (ImageNet's usual numbering).
    """

    def __init__(
        self, root: Path, labels: str = "none", *, argument: str = "data.root", labels_argument: str = "data.labels"
    ) -> None:
        """List the images.

        Args:
            root: folder of images, at any depth.
            labels: folders, none, or the path of a CSV file with the columns file and label.
            argument: name of `root` in messages.
            labels_argument: name of `labels` in messages.

        Raises:
            UserError: there is no such folder, it has no images, or the labels do not match the images.
        """
        require(os.path.isdir(root), f"`{argument}` must be a folder of images, and there is none at {root}.")
        self.root = root
        listing = list_folder(root, argument)
        files = [name for name in listing.files if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
        require(bool(files), f"`{argument}` must hold images ({', '.join(sorted(IMAGE_SUFFIXES))}): {root} has none.")
        names: list[str] = []
        if labels == "folders":
            names = _top_folders(root, files, listing.folders, argument)
        elif labels != "none":
            names = _read_csv(Path(labels), root, files, labels_argument)
        numbers, self.classes = number_classes(names, labels_argument)
        self.files, self.labels = FileNames(files), np.array(numbers or [NO_LABEL] * len(files))
        self.num_classes = int(self.labels.max()) + 1 or None
        self.notes = tuple(filter(None, (_describe_rest(root, listing), _describe_classes(self.classes))))

    def __len__(self) -> int:
        return len(self.files)

    def read_bytes(self, index: int) -> bytes:
        return (self.root / self.files[index]).read_bytes()

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])


@dataclass(kw_only=True, eq=False)
class FolderData(ImageDataModule):
    """Data module of the images under a folder."""

    root: str
    """Folder of images, at any depth."""
    labels: str = "none"
    """folders (the sub-folders of `root` are the classes), none, or a .csv file with the columns file and label."""

    def source(self) -> FolderImageSource:
        return FolderImageSource(Path(self.root), self.labels)


def number_classes(names: list[str], argument: str) -> tuple[list[int], list[str]]:
    """Return the label of each image, and the sorted class names; no names if the labels are whole numbers.

    Args:
        names: class of each image as text.
        argument: name of the labels in messages.

    Raises:
        UserError: a label is another number, or a number is written in two ways.
    """
    texts = set(names)
    other = sorted(text for text in texts if NUMBER.fullmatch(text) and not WHOLE_NUMBER.fullmatch(text))
    require(
        not other,
        f"`{argument}` must be names or whole numbers from 0 with at most 9 digits, and {len(other)} are not, the "
        f"first of them {other and other[0]!r}. Rename it, or leave out its images.",
    )
    if not all(WHOLE_NUMBER.fullmatch(text) for text in texts):
        classes = sorted(texts)
        labels = {text: label for label, text in enumerate(classes)}
        return [labels[text] for text in names], classes
    labels = {text: int(text.split(".")[0]) for text in texts}
    counts = Counter(labels.values())
    repeated = sorted(text for text in texts if counts[labels[text]] > 1)
    require(
        not repeated, f"`{argument}` must write each number in one way, and there are {' and '.join(repeated[:2])}."
    )
    return [labels[text] for text in names], []


def _describe_rest(root: Path, listing: Listing) -> str:
    """Return what is left out of a folder, empty if nothing is."""
    suffixes = (PurePosixPath(name).suffix or "no suffix" for name in listing.files)
    others = Counter(suffix for suffix in suffixes if suffix.lower() not in IMAGE_SUFFIXES)
    parts = []
    if others:
        parts.append(
            f"{others.total()} files ({', '.join(f'{count} {name}' for name, count in others.most_common(5))})"
        )
    if listing.hidden:
        parts.append(f"{len(listing.hidden)} hidden or system entries (the first: {listing.hidden[0]})")
    return f"{root}: left out {' and '.join(parts)}." if parts else ""


def _describe_classes(classes: list[str]) -> str:
    """Return the numbers of the classes if some names are numbers and others are not, else an empty string."""
    if not any(WHOLE_NUMBER.fullmatch(name) for name in classes):
        return ""
    numbers = ", ".join(f"{label} = {name}" for label, name in enumerate(classes[:20]))
    return f"Classes are numbered in the order of their names: {numbers}{', …' if len(classes) > 20 else ''}."


def _top_folders(root: Path, files: list[str], folders: list[str], argument: str) -> list[str]:
    """Return the first part of each path.

    Raises:
        UserError: an image is not in a sub-folder, or a sub-folder has no image.
    """
    loose = [file for file in files if "/" not in file]
    require(
        not loose,
        f"`{argument}` must have one sub-folder per class, and {root} itself holds {loose and loose[0]}. "
        "Move it into a sub-folder, or use no labels.",
    )
    names = [file.split("/")[0] for file in files]
    empty = sorted({folder.split("/")[0] for folder in folders} - set(names))
    require(
        not empty,
        f"`{argument}` must have images ({', '.join(sorted(IMAGE_SUFFIXES))}) in each class folder, and {len(empty)} "
        f"of {root} have none, the first of them {empty and empty[0]}. Remove it, or add images.",
    )
    return names


def _read_csv(table: Path, root: Path, files: list[str], argument: str) -> list[str]:
    """Return the label of each file.

    Raises:
        UserError: the file is not such a table, or does not name each image once.
    """
    require(
        table.suffix.lower() == ".csv",
        f"`{argument}` must be folders, none or the name of a .csv file, got {str(table)!r}.",
    )
    try:
        # File names are bytes: those that are not UTF-8 match if the table holds the same bytes.
        with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            rows = [(row.get("file"), row.get("label")) for row in reader]
            columns = reader.fieldnames or []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"`{argument}` must be a readable CSV file, and {table} is not: {error}.") from error
    require(
        {"file", "label"} <= set(columns),
        f"`{argument}` must have the header file,label in UTF-8 with commas, and {table} has not.",
    )
    absolute_root = os.path.abspath(root)
    names = {
        os.path.normpath(os.path.join(absolute_root, file)).removeprefix(f"{absolute_root}/"): label.strip()
        for file, label in rows
        if file and label and label.strip()
    }
    require(
        len(names) == len(rows),
        f"`{argument}` must have a file and a label in every line and each file once, and {len(rows) - len(names)} "
        f"of {len(rows)} lines of {table} do not.",
    )
    for holder, other, extra in ((root, table, set(files) - set(names)), (table, root, set(names) - set(files))):
        require(
            not extra,
            f"`{argument}` must name exactly the images under {root}, and {len(extra)} of {holder} are not in {other}, "
            f"the first of them {min(extra, default='')}.",
        )
    return [names[file] for file in files]
