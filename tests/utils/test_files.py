import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sagl.errors import UserError
from sagl.utils.files import (
    atomic_file,
    atomic_folder,
    cache_file,
    cache_folder,
    expand_path,
    expand_paths,
    file_version,
    is_partial,
    packaged_configs,
    remove_partial,
    require_writable,
    write_text,
)
from tests.helpers.errors import refused
from tests.helpers.files import contents


def test_the_cache_folder_is_set_by_sagl_cache_then_xdg_cache_home_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SAGL_CACHE", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "system"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SAGL_CACHE")
    assert cache_folder() == tmp_path / "system" / "sagl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "sagl"


def test_packaged_configs_are_in_the_checkout_or_inside_the_package(monkeypatch, tmp_path):
    assert packaged_configs() == Path(__file__).parents[2] / "configs"
    monkeypatch.setattr("sagl.utils.files.__file__", str(tmp_path / "sagl" / "utils" / "files.py"))
    (tmp_path / "sagl" / "configs").mkdir(parents=True)
    assert packaged_configs() == tmp_path / "sagl" / "configs"


def test_a_file_gets_its_name_when_it_is_complete_and_replaces_an_old_one(tmp_path):
    path = tmp_path / "deep" / "er" / "a.bin"
    for old, new in ((None, b"first"), (b"first", b"second")):
        with atomic_file(path) as partial:
            partial.write_bytes(new)
            assert partial.parent == path.parent
            assert (path.read_bytes() if path.exists() else None) == old
        assert [(p, data) for p, (data, _) in contents(tmp_path).items()] == [(path, new)]


def test_files_of_a_folder_are_synced_and_readable_before_it_has_its_name(tmp_path, monkeypatch):
    events, replace = [], os.replace
    monkeypatch.setattr("os.fsync", lambda descriptor: events.append(os.fstat(descriptor).st_mode & 0o777))
    monkeypatch.setattr("os.replace", lambda old, new: [events.append(new), replace(old, new)])
    before = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "a") as partial:
            (partial / "b").touch(mode=0o600)
    finally:
        os.umask(before)
    assert events == [0o644, tmp_path / "a"]


KILLED = """
import os, sys
from pathlib import Path
from sagl.utils.files import atomic_file, atomic_folder
with atomic_file(Path(sys.argv[1]) / "a.bin") as file, atomic_folder(Path(sys.argv[1]) / "folder") as folder:
    file.write_bytes(b"half")
    (folder / "b").write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""


def test_incomplete_files_are_removed_once_their_writer_is_dead_and_others_never(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert len([path for path in tmp_path.iterdir() if is_partial(path)]) == 2
    others = {tmp_path / name for name in ("film.mkv.partial", "a.bin.x.partial", ".7.partial", "a.bin.7.partial.txt")}
    for path in others:
        path.touch()
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "link.7.partial").symlink_to("film.mkv.partial")
    with atomic_file(tmp_path / "c.bin") as file, atomic_folder(tmp_path / "d") as folder:
        remove_partial(tmp_path, "*")
        assert {*others, tmp_path / "x.partial", tmp_path / "link.7.partial", file, folder} == set(tmp_path.iterdir())


def test_a_writer_whose_file_was_removed_before_it_was_locked_creates_it_again(tmp_path, monkeypatch):
    lock = fcntl.flock
    removals = iter([lambda: next(tmp_path.iterdir()).unlink(), lambda: None])
    monkeypatch.setattr("fcntl.flock", lambda *arguments: [next(removals)(), lock(*arguments)])
    with atomic_file(tmp_path / "a") as partial:
        partial.write_bytes(b"a")
        monkeypatch.setattr("fcntl.flock", lock)
        remove_partial(tmp_path, "*")
    assert (tmp_path / "a").read_bytes() == b"a"


def test_a_file_of_the_cache_replaces_what_killed_processes_left_of_it(tmp_path):
    for name in ("index[1].npy.7.partial", "index1.npy.7.partial"):
        (tmp_path / name).touch()
    with cache_file(tmp_path / "index[1].npy") as partial:
        partial.write_bytes(b"a")
    assert {path.name for path in tmp_path.iterdir()} == {"index[1].npy", "index1.npy.7.partial"}


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("text")
    for path in (tmp_path / "used", tmp_path / "used" / "notes.txt"):
        with pytest.raises(UserError, match=f"`target` .*{path}"), atomic_folder(path, "target"):
            pytest.fail("opened")
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as partial:
        (partial / "a").touch()
    assert [path.name for path in contents(tmp_path)] == ["a", "notes.txt"]


@pytest.mark.parametrize("raised", [KeyError("a defect"), KeyboardInterrupt(), UserError("`a` must be b."), OSError()])
def test_a_block_that_fails_changes_nothing(raised, tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    before = contents(tmp_path)
    expected = UserError if isinstance(raised, OSError) else type(raised)
    for name in ("old", "new"):
        with pytest.raises(expected), atomic_file(tmp_path / name) as partial:  # noqa: PT012 (the block is what fails)
            partial.write_bytes(b"half")
            raise raised
    with pytest.raises(expected), atomic_folder(tmp_path / "folder") as partial:  # noqa: PT012
        (partial / "a").write_bytes(b"half")
        raise raised
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_an_error_of_the_file_system_names_the_argument_the_path_and_the_reason(number, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with refused("`file`", tmp_path / "a", os.strerror(number)), atomic_file(tmp_path / "a", "file") as partial:
        partial.write_bytes(b"a")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["taken/a.bin", "folder"])
def test_a_file_in_a_file_or_over_a_folder_is_refused(name, tmp_path):
    (tmp_path / "taken").write_text("text")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match="`output`"), atomic_file(tmp_path / name) as partial:
        partial.write_bytes(b"a")
    assert [path.name for path in contents(tmp_path)] == ["taken"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_has_the_permissions_of_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "a") as partial:
            partial.touch(mode=0o600)
    finally:
        assert os.umask(before) == umask
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("name", [".", "existing", "new", "new/and/deep", "linked"])
def test_a_folder_that_exists_or_can_be_created_is_accepted_and_not_created(name, tmp_path, monkeypatch):
    (tmp_path / "existing").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "existing")
    monkeypatch.chdir(tmp_path)
    require_writable(Path(name))
    require_writable(tmp_path / name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "obstacle"), [("f", "f"), ("f/a/b", "f"), ("gone", "gone")])
def test_a_file_or_a_broken_link_in_the_path_is_named(name, obstacle, tmp_path):
    (tmp_path / "f").write_text("text")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with refused("`output`", f"{tmp_path / obstacle} is"):
        require_writable(tmp_path / name)


def test_a_folder_without_write_permission_is_named_with_the_argument_and_the_hint(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode & os.W_OK))
    with refused("`cache`", f"{tmp_path} is", "Set SAGL_CACHE."):
        require_writable(tmp_path / "new" / "run", "cache", "Set SAGL_CACHE.")


def test_a_path_below_a_folder_without_any_permission_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    program = f"""import os, pathlib, sagl.utils.files as files
os.geteuid() or os.setuid(65534)  # root has all permissions
files.require_writable(pathlib.Path({str(tmp_path / "locked" / "run")!r}))"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "UserError: `output`" in result.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------------------------ ~ and variables


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~", "/home/me"),
        ("~/runs/a", "/home/me/runs/a"),
        ("$SCRATCH/run 1", "/scratch/run 1"),
        ("${SCRATCH}_2/[a]", "/scratch_2/[a]"),
        ("a~b/~", "a~b/~"),
        ("5$ and $5", "5$ and $5"),
        ("~root", os.path.expanduser("~root")),
        ("$NESTED/a", "/home/me/x/a"),
    ],
)
def test_home_folders_and_variables_are_expanded_as_in_a_shell(text, expected, monkeypatch):
    for name, value in {"HOME": "/home/me", "SCRATCH": "/scratch", "NESTED": "~/x"}.items():
        monkeypatch.setenv(name, value)
    assert expand_path(text, "output") == expected
    assert expand_paths({"data": {"root": [text, 3, None]}}) == {"data": {"root": [expected, 3, None]}}


@pytest.mark.parametrize(
    ("text", "name"), [("$ABSENT/a", "ABSENT"), ("~no_such_user/a", "no_such_user"), ("~/a", "HOME")]
)
def test_a_path_that_cannot_be_expanded_is_refused_by_its_full_name(text, name, monkeypatch):
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("ABSENT", raising=False)
    with pytest.raises(UserError, match=rf"`data\.root` .*{name}"):
        expand_paths({"data": {"root": text}})


def test_a_file_of_other_content_has_another_version_although_size_and_modification_time_are_equal(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"first")
    times, version = (path.stat().st_atime_ns, path.stat().st_mtime_ns), file_version(path)
    assert file_version(path) == version
    time.sleep(0.05)  # longer than the clock of file systems stands still
    path.write_bytes(b"other")
    os.utime(path, ns=times)
    assert file_version(path) != version


def test_a_text_keeps_names_that_are_not_utf8_as_escapes(tmp_path):
    write_text(tmp_path / "a.json", '["caf\udce9 é"]')
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == ["caf\udce9 é"]
