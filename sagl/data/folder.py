"""A folder of pictures, with sub-folders as classes (ImageNet's training split, or one's own) or labels from a CSV."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sagl.data.image_data import NO_LABEL, ImageDataModule, Source
from sagl.errors import UserError, require

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
"""Of the files that are taken for pictures, in either case."""


class FolderImageSource(Source):
    """All pictures under a folder, in the order of their names."""

    def __init__(self, root: Path, labels: str = "none") -> None:
        """List them; `labels` is folders, none, or a CSV file with the columns file and label.

        Raises:
            UserError: there is no such folder, or no picture in it, or the labels are not those of its pictures.
        """
        require(root.is_dir(), f"`data.root` must be a folder of pictures, and there is none at {root}.")
        self.root = root
        files = (path.relative_to(root) for path in root.rglob("*"))
        self.files = sorted(path.as_posix() for path in files if path.suffix.lower() in ENDINGS)
        require(bool(self.files), f"`data.root` must hold pictures ({', '.join(sorted(ENDINGS))}): {root} has none.")
        names = _names(root, self.files, labels)
        self.classes, self.labels = _numbered(names)
        self.num_classes = max(self.labels, default=NO_LABEL) + 1 or None

    def __len__(self) -> int:
        """Pictures found."""
        return len(self.files)

    def encoded(self, index: int) -> bytes:
        """The file's bytes."""
        return (self.root / self.files[index]).read_bytes()

    def label(self, index: int) -> int:
        """Place of its class among the names of all (ImageNet's usual numbering), or the CSV's own number."""
        return self.labels[index] if self.labels else NO_LABEL

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.root / self.files[index])


@dataclass(kw_only=True, eq=False)
class FolderData(ImageDataModule):
    """Pictures under a folder."""

    root: str
    """Folder with pictures, at any depth."""
    labels: str = "none"
    """folders: the first level of sub-folders are the classes; none: no classes; or a .csv file: file,label."""

    def source(self) -> FolderImageSource:
        """The folder's pictures."""
        return FolderImageSource(Path(self.root), self.labels)


def _names(root: Path, files: Sequence[str], labels: str) -> list[str] | list[int]:
    """Each file's class, by name or by number; empty where there are none."""
    if labels == "none":
        return []
    if labels == "folders":
        return _sub_folders(root, files)
    file = Path(labels)
    require(
        file.suffix.lower() == ".csv",
        f"`data.labels` must be folders, none or the name of a .csv file, got {labels!r}.",
    )
    named = _read_csv(file)
    _require_same(file, set(named), root, set(files))
    names = [named[name] for name in files]
    numbers = [int(name) for name in names if name.isdecimal()]
    return numbers if len(numbers) == len(names) else names


def _numbered(names: list[str] | list[int]) -> tuple[list[str], list[int]]:
    """Classes in the order of their names, and each picture's; numbers stay what they are, without names."""
    classes = sorted({name for name in names if isinstance(name, str)})
    place = {name: label for label, name in enumerate(classes)}
    return classes, [name if isinstance(name, int) else place[name] for name in names]


def _sub_folders(root: Path, files: Sequence[str]) -> list[str]:
    """The first part of each path."""
    loose = [file for file in files if "/" not in file]
    require(
        not loose,
        f"`data.root` must have one sub-folder a class, and {root} itself holds {loose and loose[0]}. "
        "Move it into one, or give --data.labels none.",
    )
    return [file.split("/")[0] for file in files]


def _read_csv(file: Path) -> dict[str, str]:
    """Labels by file.

    Raises:
        UserError: the table is none, or has lines without a label, or a file twice.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            table = csv.DictReader(lines)
            rows = [(row.get("file"), row.get("label")) for row in table]
            columns = table.fieldnames or []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"`data.labels` must be a CSV file that can be read, and {file} is none: {error}.") from error
    require({"file", "label"} <= set(columns), f"`data.labels` must have the header file,label, and {file} has not.")
    named = {name: label.strip() for name, label in rows if name and label and label.strip()}
    require(
        len(named) == len(rows),
        f"`data.labels` must have a file and its label in every line, no file twice, and {len(rows) - len(named)} "
        f"of {len(rows)} lines of {file} are others.",
    )
    return named


def _require_same(table: Path, named: set[str], root: Path, found: set[str]) -> None:
    """Refuse pictures without a line, and lines without a picture."""
    for there, absent, missing in ((root, table, sorted(found - named)), (table, root, sorted(named - found))):
        require(
            not missing,
            f"`data.labels` must name the pictures under {root}, no more and no fewer, and {len(missing)} of {there} "
            f"are not in {absent}, the first of them {missing and missing[0]}.",
        )
