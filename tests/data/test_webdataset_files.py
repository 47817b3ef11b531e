import random
import shutil
from pathlib import Path

import pytest

from sagl.data import webdataset_files
from sagl.data.webdataset import ShardData
from sagl.data.webdataset_files import shard_files
from sagl.errors import UserError
from tests.helpers.files import write_members, write_shards


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Replace the download by copies from the folder `served`; return the list of requested addresses."""
    urls = []

    def copy(url, target, *, check, folder_argument):
        assert folder_argument == "data.cache"
        if not target.exists():
            urls.append(url)
            file = tmp_path / "served" / Path(url.split("?")[0]).name
            check(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        return target

    monkeypatch.setattr(webdataset_files, "download", copy)
    return urls


def test_paths_folders_globs_braces_and_lists_name_the_same_files(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "a b")
    monkeypatch.chdir(tmp_path)
    names = ["a b", "a b/cat-*.tar", "a b/cat-{000000..000004}.tar", [str(shard) for shard in shards]]
    names += [f"{tmp_path}/a b/cat-00000[0-4].tar", ["a b/cat-000000.tar", "a b/cat-{000001..000004}.tar"]]
    names += [f"{(tmp_path / 'a b').as_uri()}/cat-{{000000..000004}}.tar"]
    for name in names:
        assert [file.absolute() for file in shard_files(name, tmp_path)] == shards


def test_an_existing_file_is_used_whatever_its_name(tmp_path):
    shard = write_members(tmp_path / "odd{1..2}[x].tar", [])
    assert shard_files(str(shard), tmp_path) == [shard]


@pytest.mark.parametrize(
    ("shards", "value"),
    [
        ("absent-{0..3}.tar", "absent-0.tar"),
        ("absent/*.tar", "absent"),
        ([], "empty"),
        ("pipe:cat a.tar", "'pipe:cat a.tar'"),
        ("PIPE:cat a-{0..3}.tar", "'PIPE:cat"),
        ("s3://bucket/a.tar", "'s3://bucket/a.tar'"),
        ("a.tar::pipe:true", "'a.tar::pipe:true'"),
        ("a-{3..1", r"a-\{3..1"),
        ("${ABSENT}.tar", r"\$\{ABSENT\}.tar"),
    ],
)
def test_missing_shards_and_commands_are_refused(shards, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_members(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match=f"`data.shards`.*{value}"):
        shard_files(shards, tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b" + bytes(2000), b"no tar" * 1000])
def test_files_that_are_not_uncompressed_tars_are_refused(content, tmp_path):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"`data.shards`.*a.tar"):
        ShardData(shards=str(tmp_path / "a.tar")).source()


def test_shards_with_a_url_are_downloaded_once_into_the_cache(downloads, tmp_path, cache):
    shards = write_shards(tmp_path / "served", size=2)
    data = ShardData(shards="https://a/b/cat-{000000..000010}.tar?token=a:b")
    data.prepare_data()
    data.prepare_data()
    assert downloads == [f"https://a/b/{shard.name}?token=a:b" for shard in shards]
    source = data.source()
    assert [shard.read_bytes() for shard in source.shards] == [shard.read_bytes() for shard in shards]
    assert {shard.parent for shard in source.shards} == {cache / "shards"}
    assert len(source) == 22


def test_equal_names_at_different_urls_are_different_files(downloads, tmp_path):
    write_shards(tmp_path / "served")
    names = [f"https://a/{folder}/cat-000000.tar" for folder in ("a", "b")]
    files = ShardData(shards=names, cache=str(tmp_path / "downloads")).source().shards
    assert len(set(files)) == 2
    assert {file.parent for file in files} == {tmp_path / "downloads"}


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://host/a%00b.tar", f"http://host/{300 * 'n'}.tar", "http://host/é.tar", "http://a b/c.tar"],
)
def test_addresses_that_cannot_be_used_are_refused(url, tmp_path):
    with pytest.raises(UserError, match=r"`data.shards`|`url`"):
        shard_files(url, tmp_path / "downloads")


def test_a_downloaded_file_that_is_not_a_tar_is_refused(downloads, tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(random.Random(0).randbytes(1000))
    with pytest.raises(UserError, match=r"`data.shards`.*a.tar"):
        shard_files("https://a/a.tar", tmp_path / "downloads")
