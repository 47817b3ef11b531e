"""Folders of images. Labels come from the sub-folders, as in ImageNet's training split, or from a CSV file."""

import csv
from dataclasses import dataclass
from pathlib import Path

from sagl.data.image_data import NO_LABEL, ImageDataModule, ImageSource
from sagl.errors import UserError, require

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
"""Suffixes of image files, in lower case; the case of a file's suffix does not matter."""


class FolderImageSource(ImageSource):
    """Image source of all images under a folder, sorted by path.

    A label is the position of the class in the sorted class names (ImageNet's usual numbering); whole numbers in a CSV
    file are used as they are.
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
        require(root.is_dir(), f"`{argument}` must be a folder of images, and there is none at {root}.")
        self.root = root
        paths = (path.relative_to(root) for path in root.rglob("*"))
        self.files = sorted(path.as_posix() for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
        require(
            bool(self.files), f"`{argument}` must hold images ({', '.join(sorted(IMAGE_SUFFIXES))}): {root} has none."
        )
        names: list[str] = []
        if labels == "folders":
            names = _top_folders(root, self.files, argument)
        elif labels != "none":
            names = _read_csv(Path(labels), root, self.files, labels_argument)
        numeric = labels != "folders" and all(name.isdecimal() for name in names)
        self.classes = [] if numeric else sorted(set(names))
        numbers = {name: label for label, name in enumerate(self.classes)}
        self.labels = [int(name) if numeric else numbers[name] for name in names]
        self.num_classes = max(self.labels, default=NO_LABEL) + 1 or None

    def __len__(self) -> int:
        return len(self.files)

    def read_bytes(self, index: int) -> bytes:
        return (self.root / self.files[index]).read_bytes()

    def label(self, index: int) -> int:
        return self.labels[index] if self.labels else NO_LABEL

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


def _top_folders(root: Path, files: list[str], argument: str) -> list[str]:
    """Return the first part of each path."""
    loose = [file for file in files if "/" not in file]
    require(
        not loose,
        f"`{argument}` must have one sub-folder per class, and {root} itself holds {loose and loose[0]}. "
        "Move it into a sub-folder, or use no labels.",
    )
    return [file.split("/")[0] for file in files]


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
        with table.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            rows = [(row.get("file"), row.get("label")) for row in reader]
            columns = reader.fieldnames or []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"`{argument}` must be a readable CSV file, and {table} is not: {error}.") from error
    require({"file", "label"} <= set(columns), f"`{argument}` must have the header file,label, and {table} has not.")
    names = {file: label.strip() for file, label in rows if file and label and label.strip()}
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
