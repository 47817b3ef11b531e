import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from sagl.commands import doctor
from sagl.commands.doctor import extractors, folders, machine, mpi, versions
from sagl.errors import UserError
from tests.helpers.tiny import contents, exit_code, write_fashion_mnist


def line(lines, what):
    """How one thing stands, and what to do about it."""
    (found,) = [(state, todo) for name, state, todo in lines if name == what]
    return found


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache folder that is not there yet."""
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def missing(monkeypatch):
    """No package at all is installed."""

    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)


def test_a_report_has_a_line_for_everything_and_changes_nothing(own_cache, tmp_path, capsys):
    assert exit_code("doctor") == 0
    out = capsys.readouterr().out
    things = [*doctor.LIBRARIES, *doctor.OPTIONAL, "python", "threads", "GPU", "mpi4py", "cache", "Fashion-MNIST"]
    assert [name for name in things if not re.search(f"^{name} ", out, re.M)] == []
    assert torch.__version__.split("+")[0] in out
    assert contents(tmp_path) == {}


def test_what_is_to_be_done_is_printed_to_the_letter(own_cache, missing, capsys):
    assert exit_code("doctor") == 0
    out = capsys.readouterr().out
    assert [todo for _, _, todo in (*versions(), *mpi(), *extractors()) if todo not in out] == []


def test_doctor_takes_no_flags():
    with pytest.raises(UserError, match="there is no option '--fast'"):
        doctor.main(["--fast"])


# ---------------------------------------------------------------------------------------------------- packages


def test_a_package_that_is_missing_is_named_with_what_installs_it(missing):
    assert line(versions(), "torch") == ("missing", "pip install torch")
    assert line(versions(), "diffusers") == ("not installed", "pip install 'sagl[hub]'")
    assert line(extractors(), "effnet_lite0_64") == ("not usable", "pip install 'sagl[offline-metrics]'")
    assert line(extractors(), "inception") == ("not usable", "pip install 'sagl[eval]'")
    assert line(mpi(), "mpi4py") == ("not installed, not needed", "")


def test_every_extra_that_is_named_is_one_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {f"sagl[{extra}]" for extra in project["optional-dependencies"]} >= set(doctor.OPTIONAL.values())


def test_a_report_is_made_where_torch_itself_is_missing():
    program = """import sys
sys.modules.update(dict.fromkeys(["torch", "torchvision", "lightning"]))
from sagl.cli import main
sys.exit(main(["doctor"]))"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    assert "python " in done.stdout


def test_data_are_looked_for_where_torchvision_is_missing(own_cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.delitem(sys.modules, "sagl.data.fashion_mnist", raising=False)
    assert len(list(doctor.data())) == 1


@pytest.mark.parametrize(
    ("source", "state"),
    [("", "works"), ("raise RuntimeError('cannot load MPI library')", "broken"), ("import os; os.abort()", "broken")],
)
def test_an_mpi4py_without_its_library_is_found_and_the_way_out_is_said(source, state, monkeypatch, tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()
    (tmp_path / "mpi4py" / "MPI.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found, todo = line(mpi(), "mpi4py")
    assert found == state
    assert ("pip uninstall mpi4py" in todo) == (state == "broken")
    assert "mpi4py" not in sys.modules


# ----------------------------------------------------------------------------------------------------- machine


@pytest.mark.parametrize(("threads", "todo"), [(1, ""), (2, ""), (3, "export OMP_NUM_THREADS=2")])
def test_more_threads_than_cores_are_advised_against(threads, todo, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert line(machine(), "threads") == (f"{threads} on 2 cores", todo)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_fast_where_the_processor_says_so(fast, monkeypatch):
    monkeypatch.setattr(doctor, "has_fast_bfloat16", lambda: fast)
    assert line(machine(), "fast bfloat16") == ("yes" if fast else "no", "")


@pytest.mark.parametrize(("names", "said"), [([], "none"), (["A100", "T4"], "A100, T4")])
def test_gpus_are_named(names, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    assert line(machine(), "GPU") == (said, "")


# ----------------------------------------------------------------------------------------------- cache and data


def test_the_cache_is_named_with_what_it_holds(own_cache):
    state, todo = line(folders(), "cache")
    assert re.fullmatch(rf"{re.escape(str(own_cache))}, \d+ GB free", state)
    assert todo == ""
    assert line(folders(), "released networks") == ("none in the cache", "")
    (own_cache / "models").mkdir(parents=True)
    for name in ("lsun_cat.pt", "128x128_diffusion.pt", "lsun_horse.pt.partial"):
        (own_cache / "models" / name).touch()
    assert line(folders(), "released networks") == ("128x128_diffusion.pt, lsun_cat.pt", "")
    assert "fashion_mnist" in line(folders(), "configs")[0]


def test_a_cache_that_may_not_be_written_is_found_and_the_way_out_is_said(own_cache, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert line(folders(), "cache")[1] == "cannot be written: export SAGL_CACHE=FOLDER"


def test_a_cache_that_is_a_file_cannot_be_written(own_cache):
    own_cache.write_text("mine")
    assert line(folders(), "cache")[1].startswith("cannot be written")


def test_data_are_found_in_the_cache_or_where_debian_puts_them_or_are_to_be_fetched(own_cache, monkeypatch, tmp_path):
    monkeypatch.setattr("sagl.data.fashion_mnist.DEBIAN_FOLDER", tmp_path / "debian")
    state, todo = line(doctor.data(), "Fashion-MNIST")
    assert (state, "apt-get install dataset-fashion-mnist" in todo) == ("not here", True)
    (tmp_path / "debian").mkdir()
    assert line(doctor.data(), "Fashion-MNIST") == (f"in {tmp_path / 'debian'}", "")
    write_fashion_mnist(own_cache)
    assert line(doctor.data(), "Fashion-MNIST") == ("in the cache", "")
