import os

import pytest

from sagl.errors import UserError
from sagl.utils.listing import is_hidden, list_folder


def test_everything_is_listed_once_and_in_order_and_links_are_followed(tmp_path):
    for name in ("root/b/x", "root/a y/[1]*.png", "store/z", "root/.hidden/x", "root/b/Thumbs.db"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    root, latin = tmp_path / "root", os.fsdecode(b"\xe9")
    (root / latin).touch()
    (root / "folder").symlink_to("../store")
    (root / "file").symlink_to("b/x")
    (root / ".broken").symlink_to("nowhere")
    (root / "c.png").mkdir()
    listing = list_folder(root, "root")
    assert listing.files == ["a y/[1]*.png", "b/x", "file", "folder/z", latin]
    assert listing.folders == ["a y", "b", "c.png", "folder"]
    assert listing.hidden == [".broken", ".hidden", "b/Thumbs.db"]
    assert not is_hidden("_")


@pytest.mark.parametrize("target", [".", "..", "loop", "nowhere", "deep/back"])
def test_links_that_are_broken_or_lead_to_folders_above_are_refused(target, tmp_path):
    root = tmp_path / "above" / "root"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "back").symlink_to("../loop" if target == "deep/back" else ".")
    (root / "loop").symlink_to(target)
    with pytest.raises(UserError, match=r"`root`.*(loop|back)"):
        list_folder(root, "root")


def test_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"`root`.*pipe\.png"):
        list_folder(tmp_path, "root")


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"`root`.*secret.*Permission denied"):
        list_folder(tmp_path, "root")
