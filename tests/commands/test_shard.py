import errno
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sagl.data.lsun import LSUNImageSource
from sagl.data.registry import open_image_source
from sagl.data.webdataset import ShardImageSource
from tests.helpers.commands import exit_code, refusal
from tests.helpers.files import (
    FOLDER_FILES,
    NPZ_IMAGES,
    NPZ_LABELS,
    contents,
    read_all,
    write_csv,
    write_fashion_mnist,
    write_folder,
    write_lsun,
    write_npz,
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))


def shard(tmp_path, source, *flags, output="out"):
    """Run the command; return the images of the shards that it wrote."""
    assert exit_code("shard", source, "--output", tmp_path / output, "--progress", "off", *flags) == 0
    return ShardImageSource(sorted((tmp_path / output).glob("*.tar")))


def files(folder):
    return {path.name: data for path, (data, _) in contents(folder).items()}


# ---------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize(("kind", "suffix"), [("WEBP", "webp"), ("JPEG", "jpg")])
def test_the_files_of_an_lsun_database_are_not_changed(kind, suffix, tmp_path):
    folder = write_lsun(tmp_path / "cat", kind)
    source = shard(tmp_path, folder, "--shard_size", "4")
    assert read_all(source) == read_all(LSUNImageSource(folder))
    assert [path.name for path in source.shards] == [f"cat-{n:06d}.tar" for n in range(3)]
    assert source.name(4) == f"000000004.{suffix} in {source.shards[1]}"


@pytest.mark.parametrize(
    ("labels", "expected"), [("folders", [0, 1, 1, 2, 2]), ("none", [-1] * 5), ("csv", [4, 1, 2, 3, 0])]
)
def test_the_files_of_a_folder_are_not_changed_and_its_labels_are_a_choice(labels, expected, tmp_path):
    root = write_folder(tmp_path / "images")
    table = write_csv(tmp_path / "labels.csv", dict(zip(FOLDER_FILES, range(5), strict=True)))
    source = shard(tmp_path, root, "--labels", table if labels == "csv" else labels)
    assert read_all(source) == [
        ((root / name).read_bytes(), label) for name, label in zip(sorted(FOLDER_FILES), expected, strict=True)
    ]


def test_images_of_an_npz_are_stored_without_loss(tmp_path):
    files, labels = zip(*read_all(shard(tmp_path, write_npz(tmp_path / "a.npz"))), strict=True)
    assert np.array_equal([np.array(Image.open(io.BytesIO(file))) for file in files], NPZ_IMAGES)
    assert list(labels) == NPZ_LABELS.tolist()


def test_fashion_mnist_is_a_source(tmp_path):
    write_fashion_mnist(tmp_path / "cache")
    source = shard(tmp_path, "fashion_mnist", "--shard_size", "150")
    assert [len(ShardImageSource([path])) for path in source.shards] == [150, 50]
    assert read_all(source) == read_all(open_image_source("fashion_mnist"))


def test_a_corrupt_image_keeps_its_index(tmp_path):
    root = write_folder(tmp_path / "images")
    (root / sorted(FOLDER_FILES)[2]).write_bytes(b"")
    assert [len(data) > 0 for data, _ in read_all(shard(tmp_path, root))] == [True, True, False, True, True]


def test_shards_can_be_the_source_of_other_shards(tmp_path):
    first = shard(tmp_path, write_npz(tmp_path / "a.npz"))
    for source in (tmp_path / "out", tmp_path / "out" / "a-{000000..000000}.tar", f"{tmp_path}/out/*.tar"):
        second = shard(tmp_path, source, "--shard_size", "3", "--name", "b", output="second")
        assert read_all(second) == read_all(first)
        assert len(second.shards) == 4


def test_what_a_folder_leaves_out_is_reported(tmp_path, capsys):
    root = write_folder(tmp_path / "images", ("a/1.png", "b/2.png", ".hidden/3.png"))
    assert [label for _, label in read_all(shard(tmp_path, root, "--labels", "folders"))] == [0, 1]
    assert ".hidden" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- repeated runs


def test_two_runs_write_the_same_bytes_and_the_manifest_describes_them(tmp_path):
    source = write_npz(tmp_path / "a.npz")
    for output in ("one", "two"):
        shard(tmp_path, source, "--shard_size", "4", output=output)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    manifest = json.loads((tmp_path / "one" / "shards.json").read_text())
    assert [entry["images"] for entry in manifest.values()] == [4, 4, 2]
    for name, entry in manifest.items():
        assert hashlib.sha256((tmp_path / "one" / name).read_bytes()).hexdigest() == entry["sha256"]
    with tarfile.open(tmp_path / "one" / "a-000000.tar") as tar:
        assert {(m.mtime, m.uname, m.gname, m.mode, m.uid) for m in tar} == {(0, "root", "root", 0o644, 0)}


def test_a_repeated_run_writes_only_the_missing_shards(tmp_path, capsys):
    source = write_npz(tmp_path / "a.npz")
    shard(tmp_path, source, "--shard_size", "4")
    expected, before = files(tmp_path / "out"), contents(tmp_path / "out")
    for name in ("a-000001.tar", "shards.json"):
        (tmp_path / "out" / name).unlink()
    shard(tmp_path, source, "--shard_size", "4")
    assert files(tmp_path / "out") == expected
    unchanged = [path.name for path, value in contents(tmp_path / "out").items() if before[path] == value]
    assert unchanged == ["a-000000.tar", "a-000002.tar"]


def test_an_unreadable_image_ends_the_run_with_complete_files_only(tmp_path, capsys, monkeypatch):
    root = write_folder(tmp_path / "images")
    unreadable, read_bytes = root / "dogs" / "a.bmp", Path.read_bytes

    def read_others(path):
        if path == unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read_others)
    assert exit_code("shard", root, "--output", tmp_path / "out", "--shard_size", "2") == 2
    assert str(unreadable) in capsys.readouterr().err
    assert list(files(tmp_path / "out")) == ["images-000000.tar"]


@pytest.mark.parametrize(
    ("flags", "conflict"),
    [
        (["--shard_size", "3"], "a-000000.tar"),
        (["--shard_size", "20"], "a-000001.tar"),
        (["--name", "b"], "a-000000.tar"),
    ],
)
def test_a_folder_of_other_shards_is_refused_and_not_changed(flags, conflict, tmp_path, capsys):
    source = write_npz(tmp_path / "a.npz")
    shard(tmp_path, source, "--shard_size", "4")
    before = contents(tmp_path / "out")
    assert exit_code("shard", source, "--output", tmp_path / "out", *flags) == 2
    assert conflict in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    other = write_npz(tmp_path / "new" / "a.npz", NPZ_IMAGES[::-1])
    assert exit_code("shard", other, "--output", tmp_path / "out", "--shard_size", "4") == 2
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["images", "--name", ".hidden"], ["name", "'.hidden'"]),
        (["absent.npz"], ["source", "absent.npz"]),
        (["a.npz", "--labels", "none"], ["labels", "a.npz"]),
        (["images", "--labels", "folder"], ["labels", "'folder'"]),
        (["images", "--shard_size", "0"], ["shard_size", "0"]),
        (["images", "--name", "a/b"], ["name", "'a/b'"]),
        (["pipe:true"], ["source", "'pipe:true'"]),
    ],
)
def test_invalid_arguments_are_refused_before_a_file_is_written(arguments, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "images", ["a.png"])
    write_npz(tmp_path / "a.npz")
    refusal(capsys, tmp_path, "shard", *arguments, "--output", "out", names=parts)
