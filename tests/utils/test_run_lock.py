import errno
import fcntl
from functools import partial
from pathlib import Path

import pytest

from sagl.errors import UserError
from sagl.utils import run_lock
from sagl.utils.run_lock import LOCK_NAME, lock_file, lock_folder
from tests.helpers.commands import environments
from tests.helpers.processes import import_from, run_ranks


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch):
    monkeypatch.setattr(run_lock, "LOCK_TIMEOUT_SECONDS", 0.2)


def test_a_second_command_is_refused_until_the_first_one_has_ended(tmp_path):
    with lock_folder(tmp_path), pytest.raises(UserError, match=r"`output`.*in use"), lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_created_and_removed_again_if_it_stays_empty(tmp_path):
    with lock_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK_NAME).exists()
    assert list(tmp_path.iterdir()) == []
    with lock_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_a_file_is_held_by_one_command_and_freed_of_what_killed_ones_left(tmp_path):
    (tmp_path / "a.npz.7.partial").touch()
    (tmp_path / "b.npz.7.partial").touch()
    with lock_file(tmp_path / "a.npz", "npz"):
        with pytest.raises(UserError, match=r"`npz`.*in use"), lock_file(tmp_path / "a.npz", "npz"):
            pass
        with lock_file(tmp_path / "c.npz"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["b.npz.7.partial"]


def test_a_lock_file_that_a_killed_command_left_behind_does_not_lock(tmp_path):
    (tmp_path / LOCK_NAME).touch()
    with lock_folder(tmp_path):
        pass


def test_a_file_system_without_locks_is_reported_and_used(tmp_path, monkeypatch, capsys):
    def refuse(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_folder(tmp_path):
        assert "no locks" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_without_a_name_is_refused(path):
    with pytest.raises(UserError, match="`target`"), lock_file(Path(path), "target"):
        pass


EXISTING_OUTPUT = """
from pathlib import Path

from sagl.errors import UserError
from sagl.settings.sampling import DeviceSettings
from sagl.utils.distributed import launch
from sagl.utils.run_lock import lock_new_file

devices = DeviceSettings(devices="2", accelerator="cpu")
try:
    with lock_new_file(Path("program.py"), devices, overwrite=False), launch(devices) as ranks:
        ranks.wait()
except UserError as error:
    print("error:", error)
"""


@pytest.mark.slow
def test_all_ranks_that_a_launcher_started_end_if_the_file_exists(tmp_path):
    (tmp_path / "program.py").write_text(EXISTING_OUTPUT)
    ranks = run_ranks(
        [], tmp_path, environments(2), timeout=120, module="program", prepare=partial(import_from, tmp_path)
    )
    assert [code for code, _ in ranks] == [0, 0], ranks
    assert [output.count("error: `output`") for _, output in ranks] == [1, 0]
    assert not list(tmp_path.glob(".*.lock"))
