"""A folder of pictures, with its sub-folders as classes: ImageNet's training split, or one's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sagl.data.pictures import NO_LABEL, PictureData
from sagl.settings.errors import require

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
"""Of the files that are taken for pictures, in either case."""


class FolderPictures:
    """All pictures under a folder, in the order of their names."""

    def __init__(self, root: Path, labels: Literal["folders", "none"] = "none") -> None:
        """List them.

        Raises:
            UserError: there is no such folder, or no picture in it, or not in sub-folders where these are the labels.
        """
        require(root.is_dir(), f"`data.root` must be a folder of pictures, and there is none at {root}.")
        self.root = root
        files = (path.relative_to(root) for path in root.rglob("*"))
        self.files = sorted(path.as_posix() for path in files if path.suffix.lower() in ENDINGS)
        require(bool(self.files), f"`data.root` must hold pictures ({', '.join(sorted(ENDINGS))}): {root} has none.")
        self.classes = sorted({file.split("/")[0] for file in self.files}) if labels == "folders" else []
        loose = [file for file in self.files if "/" not in file]
        require(
            not self.classes or not loose,
            f"`data.root` must have one sub-folder a class, and {root} itself holds {loose and loose[0]}. "
            "Move it into one, or give --data.labels none.",
        )
        self.num_classes = len(self.classes) or None
        self._index = {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        """Pictures found."""
        return len(self.files)

    def encoded(self, index: int) -> bytes:
        """The file's bytes."""
        return (self.root / self.files[index]).read_bytes()

    def label(self, index: int) -> int:
        """Place of its sub-folder among all, in the order of their names: ImageNet's usual numbering."""
        return self._index.get(self.files[index].split("/")[0], NO_LABEL)

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.root / self.files[index])


@dataclass(kw_only=True, eq=False)
class FolderData(PictureData):
    """Pictures under a folder."""

    root: str
    """Folder with pictures, at any depth."""
    labels: Literal["folders", "none"] = "none"
    """folders: the first level of sub-folders are the classes; none: there are no classes."""

    def source(self) -> FolderPictures:
        """The folder's pictures."""
        return FolderPictures(Path(self.root), self.labels)
