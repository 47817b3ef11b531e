import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from sagl.data import registry
from sagl.data.lsun import LSUNImageSource
from sagl.data.webdataset import ShardImageSource
from tests.data.test_folder import FILES, write_csv, write_pictures
from tests.data.test_lsun import write_lsun
from tests.data.test_npz import IMAGES, LABELS, write_npz
from tests.helpers.tiny import contents, exit_code, write_fashion_mnist


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sharded(tmp_path, source, *flags, output="out"):
    """The pictures of what the command wrote."""
    assert exit_code("shard", source, "--output", tmp_path / output, "--progress", "off", *flags) == 0
    return ShardImageSource(sorted((tmp_path / output).glob("*.tar")))


def files(folder):
    return {path.name: data for path, (data, _) in contents(folder).items()}


def decoded(source):
    return np.stack([np.array(Image.open(io.BytesIO(source.encoded(i)))) for i in range(len(source))])


def all_of(source):
    return [(source.encoded(i), source.label(i)) for i in range(len(source))]


# ------------------------------------------------------------------------------------------------------ sources


@pytest.mark.parametrize(("kind", "ending"), [("WEBP", "webp"), ("JPEG", "jpg")])
def test_bytes_of_an_lsun_database_pass_through_unchanged(kind, ending, tmp_path):
    folder = write_lsun(tmp_path / "cat", kind)
    pictures = sharded(tmp_path, folder, "--shard_size", "4")
    assert all_of(pictures) == all_of(LSUNImageSource(folder))
    assert [shard.name for shard in pictures.shards] == [f"cat-{n:06d}.tar" for n in range(3)]
    assert pictures.name(4) == f"000000004.{ending} in {pictures.shards[1]}"


@pytest.mark.parametrize(
    ("labels", "wanted"), [("folders", [0, 1, 1, 2, 2]), ("none", [-1] * 5), ("csv", [4, 1, 2, 3, 0])]
)
def test_a_folder_is_sharded_with_the_labels_one_wants(labels, wanted, tmp_path):
    root = write_pictures(tmp_path / "mine")
    table = write_csv(tmp_path / "labels.csv", dict(zip(FILES, range(5), strict=True)))
    pictures = sharded(tmp_path, root, "--labels", table if labels == "csv" else labels)
    assert [pictures.label(i) for i in range(5)] == wanted
    assert [pictures.encoded(i) for i in range(5)] == [(root / name).read_bytes() for name in sorted(FILES)]


def test_an_npz_is_sharded_without_loss(tmp_path):
    pictures = sharded(tmp_path, write_npz(tmp_path / "a.npz"))
    assert np.array_equal(decoded(pictures), IMAGES)
    assert [pictures.label(i) for i in range(10)] == LABELS.tolist()


def test_fashion_mnist_is_sharded_as_it_was_published(tmp_path, cache):
    write_fashion_mnist(cache)
    pictures = sharded(tmp_path, "fashion_mnist", "--shard_size", "150")
    assert [len(ShardImageSource([shard])) for shard in pictures.shards] == [150, 50]
    split = registry.FashionMNIST(cache, train=True)
    assert np.array_equal(decoded(pictures), split.data.numpy())
    assert [pictures.label(i) for i in range(200)] == split.targets.tolist()


def test_shards_are_sharded_anew(tmp_path):
    first = sharded(tmp_path, write_npz(tmp_path / "a.npz"))
    for source in (tmp_path / "out", tmp_path / "out" / "a-{000000..000000}.tar", f"{tmp_path}/out/*.tar"):
        again = sharded(tmp_path, source, "--shard_size", "3", "--name", "b", output="again")
        assert all_of(again) == all_of(first)
        assert len(again.shards) == 4


def test_a_damaged_picture_keeps_its_place(tmp_path):
    root = write_pictures(tmp_path / "mine")
    (root / sorted(FILES)[2]).write_bytes(b"")
    assert [len(data) > 0 for data, _ in all_of(sharded(tmp_path, root))] == [True, True, False, True, True]


# ------------------------------------------------------------------------------------------- the same, and again


def test_two_runs_write_the_same_bytes_and_the_record_says_which(tmp_path):
    source = write_npz(tmp_path / "a.npz")
    for output in ("one", "two"):
        sharded(tmp_path, source, "--shard_size", "4", output=output)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    record = json.loads((tmp_path / "one" / "shards.json").read_text())
    assert [entry["pictures"] for entry in record.values()] == [4, 4, 2]
    for name, entry in record.items():
        assert hashlib.sha256((tmp_path / "one" / name).read_bytes()).hexdigest() == entry["sha256"]
    with tarfile.open(tmp_path / "one" / "a-000000.tar") as tar:
        assert {(m.mtime, m.uname, m.gname, m.mode, m.uid) for m in tar} == {(0, "root", "root", 0o644, 0)}


def test_a_restart_keeps_shards_that_are_whole_and_makes_the_others(tmp_path, capsys):
    source = write_npz(tmp_path / "a.npz")
    sharded(tmp_path, source, "--shard_size", "4")
    whole, before = files(tmp_path / "out"), contents(tmp_path / "out")
    for name in ("a-000001.tar", "shards.json"):
        (tmp_path / "out" / name).unlink()
    sharded(tmp_path, source, "--shard_size", "4")
    assert files(tmp_path / "out") == whole
    kept = [path.name for path, value in contents(tmp_path / "out").items() if before[path] == value]
    assert kept == ["a-000000.tar", "a-000002.tar"]
    assert "10 pictures in 3 shards, 2 of them kept" in capsys.readouterr().out


def test_a_run_that_fails_leaves_whole_files_only(tmp_path, monkeypatch, capsys):
    root = write_pictures(tmp_path / "mine")
    (root / "dogs" / "a.bmp").unlink()
    (root / "dogs" / "a.bmp").symlink_to("nowhere")
    assert exit_code("shard", root, "--output", tmp_path / "out", "--shard_size", "2") == 2
    assert "`source` must be pictures that can be read, and" in capsys.readouterr().err
    assert list(files(tmp_path / "out")) == ["mine-000000.tar"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shard_size", "3"], "a-000000.tar holds others or is damaged"),
        (["--shard_size", "20"], "also holds a-000001.tar"),
        (["--name", "b"], "also holds a-000000.tar"),
    ],
)
def test_a_folder_of_other_shards_is_left_alone(flags, said, tmp_path, capsys):
    source = write_npz(tmp_path / "a.npz")
    sharded(tmp_path, source, "--shard_size", "4")
    before = contents(tmp_path / "out")
    assert exit_code("shard", source, "--output", tmp_path / "out", *flags) == 2
    assert said in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    other = write_npz(tmp_path / "new" / "a.npz", IMAGES[::-1])
    assert exit_code("shard", other, "--output", tmp_path / "out", "--shard_size", "4") == 2
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent"], "`source` must lead to tar files, and there is none at absent"),
        (["absent.npz"], "`source` must be an npz file"),
        (["empty"], "`source` must hold pictures"),
        (["a.npz", "--labels", "none"], "`labels` is for a folder of pictures, and a.npz is none"),
        (["mine", "--labels", "folder"], "`labels` must be folders, none or the name of a .csv file"),
        (["mine", "--shard_size", "0"], "`shard_size` must be at least 1, got 0"),
        (["mine", "--name", "a/b"], "`name` must be the first part of a file's name"),
        (["pipe:true"], "Commands are never run"),
        ([], "source"),
    ],
)
def test_what_cannot_be_sharded_ends_in_one_line_and_writes_nothing(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mine" / "a.png")
    write_npz(tmp_path / "a.npz")
    assert exit_code("shard", *arguments, "--output", "out") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
