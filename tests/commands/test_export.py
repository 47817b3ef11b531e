import numpy as np
import pytest

from tests.helpers.commands import exit_code, refusal
from tests.helpers.files import contents
from tests.helpers.networks import write_grey_unet

FLAGS = ["--num_samples", "6", "--batch_size", "4", "--sampler", "ddim", "--respacing", "2", "--compare"]
FLAGS += ["--sag.scale", "0.5", "--sag.site", "output.0", "--sag.kernel_size", "5"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of six images with its exports; no test changes it."""
    folder = tmp_path_factory.mktemp("finished")
    network = write_grey_unet(folder / "tiny.safetensors")
    assert exit_code("sample", "--checkpoint", network, "--output", folder / "run", *FLAGS) == 0
    return folder / "run"


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of that run's shards and run.json."""
    folder = tmp_path / "run"
    (folder / "shards").mkdir(parents=True)
    for path in (finished_run / "run.json", *(finished_run / "shards").iterdir()):
        (folder / path.relative_to(finished_run)).write_bytes(path.read_bytes())
    return folder


def bytes_of(folder):
    return {str(path.relative_to(folder)): data for path, (data, _) in contents(folder).items()}


def all_exports(folder):
    return ["--npz", folder / "a.npz", "--images", folder / "images", "--grid", folder / "grid.png"]


def test_exports_are_those_of_sample(finished_run, run, tmp_path):
    before = contents(run)
    assert exit_code("export", run, *all_exports(tmp_path / "out")) == 0
    expected = {
        name: data for name, data in bytes_of(finished_run).items() if not name.startswith(("shards", "run.json"))
    }
    expected["a.npz"] = expected.pop("samples_6x8x8x3.npz")
    assert bytes_of(tmp_path / "out") == expected
    assert contents(run) == before


def test_num_samples_selects_the_first(finished_run, run, tmp_path):
    out = tmp_path / "out"
    assert exit_code("export", run, *all_exports(out), "--num_samples", "5") == 0
    assert sorted(path.name for path in (out / "images").iterdir()) == [f"{i:06d}.png" for i in range(5)]
    with np.load(out / "a.npz") as five, np.load(finished_run / "samples_6x8x8x3.npz") as six:
        assert all((five[name] == six[name][:5]).all() for name in ("arr_0", "arr_1"))


def test_a_folder_with_other_images_is_refused(run, tmp_path, capsys):
    flags = ["export", run, "--images", tmp_path / "out"]
    assert exit_code(*flags) == exit_code(*flags) == 0
    refusal(capsys, tmp_path, *flags, "--num_samples", "4", names=["--images", "000004.png"])


def test_an_unfinished_run_is_exported_as_far_as_it_goes(run, tmp_path, capsys):
    (run / "shards" / "000004-000005.tar").unlink()
    assert exit_code("export", run, "--npz", tmp_path / "a.npz") == 0
    with np.load(tmp_path / "a.npz") as arrays:
        assert len(arrays["arr_0"]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"run", "a.npz"}  # and no export that was not requested
    assert "4 of 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "flags", "names"),
    [
        (".", ["--npz", "a.npz"], ["`run`"]),
        ("run", ["--num_samples", "3"], ["--npz", "--images", "--grid"]),
        ("run", ["--npz", "a.npz", "--num_samples", "0"], ["--num_samples", "1 … 6", "got 0"]),
        ("run", ["--npz", "a.npz", "--num_samples", "7"], ["--num_samples", "1 … 6", "got 7"]),
        ("run", ["--npz", "run/run.json/a.npz"], ["--npz", "a.npz"]),
        ("run", ["--grid", "run"], ["--grid", "run"]),
        ("run", ["--images", "run/run.json"], ["--images", "run.json"]),
        ("run", ["--npz", "statistics.npz"], ["--npz", "statistics.npz"]),
        ("run", ["--npz", "text.npz"], ["--npz", "text.npz"]),
        ("run", ["--npz", "a.txt"], ["--npz", ".npz", "a.txt"]),
        ("run", ["--grid", "a.jpg"], ["--grid", ".png", "a.jpg"]),
    ],
)
def test_an_impossible_export_is_refused_and_writes_nothing(folder, flags, names, run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    np.savez(run.parent / "statistics.npz", mu=np.zeros(2))
    (run.parent / "text.npz").write_text("text")
    refusal(capsys, run.parent, "export", folder, *flags, names=names)


def test_a_damaged_shard_is_named_and_no_export_is_left_incomplete(run, tmp_path, capsys):
    shard = run / "shards" / "000004-000005.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    for flags in (["--npz", tmp_path / "a.npz"], ["--grid", tmp_path / "grid.png"]):
        refusal(capsys, tmp_path, "export", run, *flags, names=[shard.name])
    assert exit_code("export", run, "--npz", tmp_path / "a.npz", "--num_samples", "4") == 0
