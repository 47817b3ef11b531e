import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from sagl.data.webdataset import ShardData
from sagl.data.webdataset_files import shard_files
from sagl.errors import UserError
from sagl.utils import download
from tests.data.test_webdataset import write_members, write_shards
from tests.helpers.tiny import QUIET

pytestmark = QUIET


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Unreliable(BaseHTTPRequestHandler):
    """Every third request fails, and of the others every second is cut in the body."""

    def do_GET(self):
        asked = self.server.asked
        asked.append((self.path, self.headers.get("Range")))
        if len(asked) % 3 == 0:
            return self.send_error(503)
        body = (self.server.folder / Path(self.path.split("?")[0]).name).read_bytes()
        first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if first else 200)
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(len(body) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[first : first + 4000] if len(asked) % 2 else body[first:])
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=lambda _: None))
    running = ThreadingHTTPServer(("127.0.0.1", 0), Unreliable)
    running.folder, running.asked = tmp_path / "served", []
    running.url = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


# ----------------------------------------------------------------------------------------------- on this machine


def test_paths_folders_globs_braces_and_lists_name_the_same_files(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "a b")
    monkeypatch.chdir(tmp_path)
    names = ["a b", "a b/cat-*.tar", "a b/cat-{000000..000004}.tar", [str(shard) for shard in shards]]
    names += [f"{tmp_path}/a b/cat-00000[0-4].tar", ["a b/cat-000000.tar", "a b/cat-{000001..000004}.tar"]]
    names += [f"{(tmp_path / 'a b').as_uri()}/cat-{{000000..000004}}.tar"]
    for name in names:
        assert [file.absolute() for file in shard_files(name, tmp_path)] == shards


def test_a_file_that_is_there_is_meant_whatever_its_name(tmp_path):
    shard = write_members(tmp_path / "odd{1..2}[x].tar", [])
    assert shard_files(str(shard), tmp_path) == [shard]


@pytest.mark.parametrize(
    ("shards", "said"),
    [
        ("absent-{0..3}.tar", "there is none at absent-0.tar"),
        ("absent/*.tar", "there is none at absent"),
        ([], "at least one shard, got an empty list"),
        ("pipe:cat a.tar", "got 'pipe:cat a.tar'. Commands are never run"),
        ("PIPE:cat a-{0..3}.tar", "Commands are never run"),
        ("s3://bucket/a.tar", "must be paths, file:, http: or https: addresses"),
        ("a.tar::pipe:true", "got 'a.tar::pipe:true'"),
        ("a-{3..1", "there is none at|brace ranges"),
        ("${ABSENT}.tar", "brace ranges like"),
    ],
)
def test_shards_that_are_nowhere_or_would_run_something_are_refused_in_one_line(shards, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_members(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match=said) as error:
        shard_files(shards, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b" + bytes(2000), b"no tar" * 1000])
def test_what_is_no_uncompressed_tar_is_refused(content, tmp_path):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"must be uncompressed tar files, and .*a.tar is none"):
        ShardData(shards=str(tmp_path / "a.tar")).source()


# ------------------------------------------------------------------------------------------------ from the network


def test_shards_of_an_unreliable_server_arrive_whole_and_once(server, cache):
    shards = write_shards(server.folder, size=2)
    data = ShardData(shards=f"{server.url}/cat-{{000000..000010}}.tar?token=a:b")
    data.prepare_data()
    pictures = data.source()
    assert [shard.read_bytes() for shard in pictures.shards] == [shard.read_bytes() for shard in shards]
    assert any(span for _, span in server.asked)  # what was cut went on
    assert {shard.parent for shard in pictures.shards} == {cache / "shards"}
    assert len(pictures) == 22
    before = len(server.asked)
    data.prepare_data()
    assert len(server.asked) == before


def test_shards_of_equal_names_at_different_addresses_are_kept_apart_where_one_says(server, tmp_path):
    write_shards(server.folder)
    names = [f"{server.url}/{folder}/cat-000000.tar" for folder in ("a", "b")]
    files = ShardData(shards=names, cache=str(tmp_path / "mine")).source().shards
    assert len(set(files)) == 2
    assert {file.parent for file in files} == {tmp_path / "mine"}


def test_a_page_or_a_closed_folder_is_refused_and_nothing_is_kept(server, tmp_path):
    server.folder.mkdir()
    (server.folder / "a.tar").write_bytes(random.Random(0).randbytes(1000))
    with pytest.raises(UserError, match=r"uncompressed tar files, and [^/]*a.tar is none"):
        shard_files(f"{server.url}/a.tar", tmp_path / "mine")
    assert [path for path in (tmp_path / "mine").iterdir() if path.suffix != ".lock"] == []
    (tmp_path / "closed").touch()
    with pytest.raises(UserError, match=r"`data.cache` must be a folder that can hold"):
        shard_files(f"{server.url}/a.tar", tmp_path / "closed")
