import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sagl.errors import UserError
from sagl.utils.files import atomic_file, cache_folder, packaged_configs, require_writable
from tests.helpers.tiny import contents


def test_the_cache_is_where_the_user_says_then_the_system_then_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SAGL_CACHE", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "system"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SAGL_CACHE")
    assert cache_folder() == tmp_path / "system" / "sagl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path(tmp_path, ".cache", "sagl")


def test_packaged_configs_are_those_of_the_checkout_or_inside_the_package(monkeypatch, tmp_path):
    assert packaged_configs() == Path(__file__).parents[2] / "configs"
    monkeypatch.setattr("sagl.utils.files.__file__", str(tmp_path / "sagl" / "utils" / "files.py"))
    (tmp_path / "sagl" / "configs").mkdir(parents=True)
    assert packaged_configs() == tmp_path / "sagl" / "configs"


# -------------------------------------------------------------------------------------------------- whole files


def test_a_file_gets_its_name_when_it_is_whole_and_its_folder_is_made(tmp_path):
    path = tmp_path / "deep" / "er" / "a.bin"
    with atomic_file(path) as partial:
        partial.write_bytes(b"half")
        assert not path.exists()
        assert partial.parent == path.parent
        partial.write_bytes(b"whole")
    assert [(p, data) for p, (data, _) in contents(tmp_path).items()] == [(path, b"whole")]


def test_what_was_there_is_replaced_at_once(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_file(path) as partial:
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("raised", [KeyError("a defect"), KeyboardInterrupt(), UserError("`a` must be b."), OSError()])
def test_a_block_that_fails_leaves_nothing_and_what_was_there_as_it_was(raised, tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    before = contents(tmp_path)
    for name in ("old", "new"):
        wanted = UserError if isinstance(raised, OSError) else type(raised)
        with pytest.raises(wanted), atomic_file(tmp_path / name) as partial:  # noqa: PT012 (the block is what fails)
            partial.write_bytes(b"half")
            raise raised
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOSPC, "Make room, then give the same command again"),
        (errno.EDQUOT, "Make room, then give the same command again"),
        (errno.EACCES, "Choose another place"),
        (errno.EROFS, "Choose another place"),
    ],
)
def test_a_disk_that_takes_no_more_is_a_refusal_with_the_reason_and_the_way_out(number, way_out, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError) as error, atomic_file(tmp_path / "a", "file") as partial:
        partial.write_bytes(b"a")
    said = f"`file` {tmp_path / 'a'} cannot be written: {os.strerror(number)}. {way_out}"
    assert str(error.value).startswith(said)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["taken/a.bin", "folder"])
def test_a_file_in_a_file_or_over_a_folder_is_refused(name, tmp_path):
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with (
        pytest.raises(UserError, match=r"`output` .* (cannot be written: |is a folder)"),
        atomic_file(tmp_path / name) as partial,
    ):
        partial.write_bytes(b"a")
    assert [path.name for path in contents(tmp_path)] == ["taken"]


# ---------------------------------------------------------------------------------------------- writable folders


@pytest.mark.parametrize("name", [".", "there", "new", "new/and/deep", "linked"])
def test_a_folder_that_is_there_or_can_be_made_is_taken_and_not_made(name, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    require_writable(Path(name))
    require_writable(tmp_path / name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "in_the_way"), [("f", "f"), ("f/a", "f"), ("f/a/b", "f"), ("gone", "gone")])
def test_a_file_or_a_broken_link_in_the_way_is_named(name, in_the_way, tmp_path):
    (tmp_path / "f").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    said = re.escape(f"`output` must be a folder, and {tmp_path / in_the_way} is a file")
    with pytest.raises(UserError, match=said):
        require_writable(tmp_path / name)


def test_a_folder_that_may_not_be_written_is_named_with_the_argument(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode & os.W_OK))
    with pytest.raises(UserError) as error:
        require_writable(tmp_path / "new" / "run", "cache")
    said = f"`cache` must be a folder that can be written, and {tmp_path} cannot. Choose another with --cache."
    assert str(error.value) == said


def test_a_path_below_a_folder_that_may_not_even_be_looked_into_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    program = f"""import os, pathlib, sagl.utils.files as paths
os.geteuid() or os.setuid(65534)  # root may look everywhere
paths.require_writable(pathlib.Path({str(tmp_path / "locked" / "run")!r}))"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False).stderr
    assert "UserError: `output`" in said.splitlines()[-1]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_written_file_has_the_rights_that_the_user_gives_to_files(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "a") as partial:
            partial.touch(mode=0o600)
    finally:
        assert os.umask(before) == umask
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode
