import errno
import fcntl

import pytest

from sagl.errors import UserError
from sagl.utils import run_lock
from sagl.utils.run_lock import LOCK, locked, sharing


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.2)


def test_a_folder_is_held_alone_and_the_next_may_have_it_afterwards(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(UserError, match="`output` must be a folder that no other command writes to"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_who_shares_lets_others_of_the_command_in_and_no_other_command(tmp_path):
    with locked(tmp_path) as lock:
        with pytest.raises(UserError, match="in use"), sharing(tmp_path):
            pass
        lock.share()
        with sharing(tmp_path), sharing(tmp_path), pytest.raises(UserError, match="in use"), locked(tmp_path):
            pass


def test_a_process_left_behind_keeps_the_next_command_out(tmp_path):
    with locked(tmp_path) as lock:
        lock.share()
        orphan = sharing(tmp_path)
        orphan.__enter__()
    with pytest.raises(UserError, match="in use"), locked(tmp_path):
        pass
    orphan.__exit__(None, None, None)
    with locked(tmp_path):
        pass


def test_a_folder_is_made_and_goes_again_if_nothing_came_into_it(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_a_lock_whose_file_was_taken_away_meanwhile_is_none(tmp_path, monkeypatch):
    flock, times = fcntl.flock, iter(range(9))

    def taken_away(file, kind):
        if next(times) == 0:
            (tmp_path / LOCK).unlink()
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", taken_away)
    with locked(tmp_path) as lock:
        assert (tmp_path / LOCK).stat().st_ino == run_lock.os.fstat(lock.file.fileno()).st_ino


def test_a_file_system_without_locks_is_said_and_no_hindrance(tmp_path, monkeypatch, capsys):
    def refuse(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        assert "no locks" in capsys.readouterr().out
