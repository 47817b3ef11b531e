import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import sagl
from sagl.commands import doctor
from sagl.commands.doctor import extractors, folders, machine, mpi, versions
from tests.helpers.commands import exit_code
from tests.helpers.files import contents, write_fashion_mnist


def line(lines, name):
    """Return state and advice of a line."""
    (line,) = [(state, todo) for other, state, todo in lines if other == name]
    return line


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache folder that does not exist."""
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def without_packages(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)


def test_a_report_has_a_line_for_everything_and_changes_nothing(cache, tmp_path, capsys):
    assert exit_code("doctor") == 0
    out = capsys.readouterr().out
    names = [*doctor.LIBRARIES, *doctor.OPTIONAL, "python", "threads", "GPU", "mpi4py", "cache", "Fashion-MNIST"]
    assert [name for name in names if not re.search(f"^{name} ", out, re.M)] == []
    assert torch.__version__.split("+")[0] in out
    assert contents(tmp_path) == {}


def test_what_to_do_is_printed_in_full(cache, without_packages, capsys):
    assert exit_code("doctor") == 0
    out = capsys.readouterr().out
    assert [todo for _, _, todo in (*versions(), *mpi(), *extractors()) if todo not in out] == []


# ---------------------------------------------------------------------------------------------------- packages


def test_a_missing_package_is_named_with_the_command_that_installs_it(without_packages):
    assert line(versions(), "torch") == ("missing", "pip install torch")
    assert line(versions(), "sagl") == (sagl.__version__, "")  # the package runs from its source folder, too
    assert line(versions(), "diffusers") == ("not installed", "pip install 'sagl[hub]'")
    assert line(extractors(), "effnet_lite0_64") == ("not usable", "pip install 'sagl[offline-metrics]'")
    assert line(extractors(), "inception") == ("not usable", "pip install 'sagl[eval]'")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {f"sagl[{extra}]" for extra in project["optional-dependencies"]} >= set(doctor.OPTIONAL.values())


def test_a_report_needs_no_torch():
    program = """import sys
sys.modules.update(dict.fromkeys(["torch", "torchvision", "lightning"]))
from sagl.cli import main
sys.exit(main(["doctor"]))"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr.splitlines()[-1]
    assert "python " in result.stdout


@pytest.mark.parametrize(
    ("source", "state"), [("", "works"), ("raise RuntimeError", "broken"), ("import os; os.abort()", "broken")]
)
def test_an_mpi4py_without_its_library_is_reported(source, state, monkeypatch, tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()
    (tmp_path / "mpi4py" / "MPI.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    actual, todo = line(mpi(), "mpi4py")
    assert (actual, "pip uninstall mpi4py" in todo) == (state, state == "broken")
    assert "mpi4py" not in sys.modules


# ----------------------------------------------------------------------------------------------------- machine


@pytest.mark.parametrize(("threads", "todo"), [(1, ""), (2, ""), (3, "export OMP_NUM_THREADS=2")])
def test_more_threads_than_cores_are_reported(threads, todo, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert line(machine(), "threads") == (f"{threads} on 2 cores", todo)


@pytest.mark.parametrize("names", [[], ["A100", "T4"]])
def test_gpus_are_named(names, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    assert line(machine(), "GPU") == (", ".join(names) or "none", "")


# ----------------------------------------------------------------------------------------------- cache and data


def test_the_cache_is_named_with_the_networks_in_it(cache):
    state, todo = line(folders(), "cache")
    assert re.fullmatch(rf"{re.escape(str(cache))}, \d+ GB free", state)
    assert todo == ""
    assert line(folders(), "released networks") == ("none in the cache", "")
    (cache / "models").mkdir(parents=True)
    for name in ("lsun_cat.pt", "128x128_diffusion.pt", "lsun_horse.pt.partial"):
        (cache / "models" / name).touch()
    assert line(folders(), "released networks") == ("128x128_diffusion.pt, lsun_cat.pt", "")
    assert "fashion_mnist" in line(folders(), "configs")[0]


@pytest.mark.parametrize("obstacle", ["permissions", "file"])
def test_a_cache_that_cannot_be_written_is_reported(obstacle, cache, monkeypatch):
    if obstacle == "file":
        cache.write_text("text")
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "SAGL_CACHE" in line(folders(), "cache")[1]


def test_fashion_mnist_may_be_in_the_cache_or_in_debians_folder(cache, monkeypatch, tmp_path):
    monkeypatch.setattr("sagl.data.fashion_mnist.DEBIAN_FOLDER", tmp_path / "debian")
    assert "apt-get install dataset-fashion-mnist" in line(doctor.data(), "Fashion-MNIST")[1]
    (tmp_path / "debian").mkdir()
    assert line(doctor.data(), "Fashion-MNIST") == (f"in {tmp_path / 'debian'}", "")
    write_fashion_mnist(cache)
    assert line(doctor.data(), "Fashion-MNIST") == ("in the cache", "")
