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
from tests.helpers.files import write_members, write_shards


class Unreliable(BaseHTTPRequestHandler):
    """Every third request fails; of the others, every second response is truncated."""

    def do_GET(self):
        requests = self.server.requests
        requests.append((self.path, self.headers.get("Range")))
        if len(requests) % 3 == 0:
            return self.send_error(503)
        body = (self.server.folder / Path(self.path.split("?")[0]).name).read_bytes()
        first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if first else 200)
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(len(body) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[first : first + 4000] if len(requests) % 2 else body[first:])
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=lambda _: None))
    running = ThreadingHTTPServer(("127.0.0.1", 0), Unreliable)
    running.folder, running.requests = tmp_path / "served", []
    running.url = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


# ------------------------------------------------------------------------------------------------------ local files


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


# -------------------------------------------------------------------------------------------------------- downloads


def test_shards_of_an_unreliable_server_are_downloaded_completely_and_once(server, cache):
    shards = write_shards(server.folder, size=2)
    data = ShardData(shards=f"{server.url}/cat-{{000000..000010}}.tar?token=a:b")
    data.prepare_data()
    source = data.source()
    assert [shard.read_bytes() for shard in source.shards] == [shard.read_bytes() for shard in shards]
    assert any(byte_range for _, byte_range in server.requests)  # truncated downloads were resumed
    assert {shard.parent for shard in source.shards} == {cache / "shards"}
    assert len(source) == 22
    before = len(server.requests)
    data.prepare_data()
    assert len(server.requests) == before


def test_equal_names_at_different_urls_are_different_files(server, tmp_path):
    write_shards(server.folder)
    names = [f"{server.url}/{folder}/cat-000000.tar" for folder in ("a", "b")]
    files = ShardData(shards=names, cache=str(tmp_path / "downloads")).source().shards
    assert len(set(files)) == 2
    assert {file.parent for file in files} == {tmp_path / "downloads"}


def test_a_downloaded_file_that_is_not_a_tar_is_refused_and_deleted(server, tmp_path):
    server.folder.mkdir()
    (server.folder / "a.tar").write_bytes(random.Random(0).randbytes(1000))
    with pytest.raises(UserError, match=r"`data.shards`.*a.tar"):
        shard_files(f"{server.url}/a.tar", tmp_path / "downloads")
    assert [path for path in (tmp_path / "downloads").iterdir() if path.suffix != ".lock"] == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"`data.cache`"):
        shard_files(f"{server.url}/a.tar", tmp_path / "file")
