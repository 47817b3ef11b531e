import numpy as np
import pytest

from tests.helpers.tiny import contents, exit_code, write_tiny

FLAGS = ["--num_samples", "6", "--batch_size", "4", "--sampler", "ddim", "--respacing", "2", "--compare"]
FLAGS += ["--sag.scale", "0.5", "--sag.site", "output.0", "--sag.kernel_size", "5"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of six with its views; no test changes it."""
    folder = tmp_path_factory.mktemp("made")
    network = write_tiny(folder / "tiny.safetensors")
    assert exit_code("sample", "--checkpoint", network, "--output", folder / "run", *FLAGS) == 0
    return folder / "run"


@pytest.fixture
def run(made, tmp_path):
    """The shards and the record of that run alone, to be changed."""
    folder = tmp_path / "run"
    (folder / "shards").mkdir(parents=True)
    for path in (made / "run.json", *(made / "shards").iterdir()):
        (folder / path.relative_to(made)).write_bytes(path.read_bytes())
    return folder


def bytes_of(folder):
    return {str(path.relative_to(folder)): data for path, (data, _) in contents(folder).items()}


def views_below(folder):
    """Flags that ask for every view."""
    return ["--npz", folder / "a.npz", "--images", folder / "images", "--grid", folder / "grid.png"]


def test_views_from_the_shards_are_those_that_sample_made(made, run, tmp_path):
    before = contents(run)
    assert exit_code("export", run, *views_below(tmp_path / "out")) == 0
    want = {name: data for name, data in bytes_of(made).items() if not name.startswith(("shards", "run.json"))}
    want["a.npz"] = want.pop("samples_6x8x8x3.npz")
    assert bytes_of(tmp_path / "out") == want
    assert contents(run) == before


def test_num_samples_takes_the_first(made, run, tmp_path, capsys):
    out = tmp_path / "out"
    assert exit_code("export", run, *views_below(out), "--num_samples", "5") == 0
    assert sorted(path.name for path in (out / "images").iterdir()) == [f"{i:06d}.png" for i in range(5)]
    with np.load(out / "a.npz") as some, np.load(made / "samples_6x8x8x3.npz") as every:
        assert all((some[name] == every[name][:5]).all() for name in ("arr_0", "arr_1"))
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == sorted(f"{out / name}: made of 5 images." for name in ("a.npz", "images", "grid.png"))


@pytest.mark.parametrize("view", ["--npz", "--images", "--grid"])
def test_only_what_was_asked_for_is_written(view, run, tmp_path):
    before = contents(tmp_path)
    assert exit_code("export", run, view, tmp_path / "out") == 0
    new = {path.relative_to(tmp_path).parts[0] for path in contents(tmp_path).keys() - before.keys()}
    assert new == {"out"}


def test_of_an_unfinished_run_what_is_there_is_exported_and_that_is_said(run, tmp_path, capsys):
    (run / "shards" / "000004-000005.tar").unlink()
    assert exit_code("export", run, "--npz", tmp_path / "a.npz") == 0
    with np.load(tmp_path / "a.npz") as arrays:
        assert len(arrays["arr_0"]) == 4
    assert f"{run} holds 4 of 6 images so far." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "flags", "named"),
    [
        ("absent", ["--npz", "a.npz"], "`run` must be the folder of a run, with images"),
        (".", ["--npz", "a.npz"], "`run` must be the folder of a run, with images"),
        ("run", [], "`export` needs --npz FILE, --images DIR or --grid FILE"),
        ("run", ["--num_samples", "3"], "`export` needs --npz FILE, --images DIR or --grid FILE"),
        ("run", ["--npz", "a.npz", "--num_samples", "0"], "`num_samples` must be 1 … 6 for run, got 0"),
        ("run", ["--npz", "a.npz", "--num_samples", "7"], "`num_samples` must be 1 … 6 for run, got 7"),
        ("run", ["--npz", "run/run.json/a.npz"], "a.npz cannot be written"),
        ("run", ["--pdf", "a.pdf"], "there is no option '--pdf'"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line_and_nothing_is_written(
    folder, flags, named, run, capsys, monkeypatch
):
    monkeypatch.chdir(run.parent)
    before = contents(run.parent)
    assert exit_code("export", folder, *flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert named in said
    assert contents(run.parent) == before


def test_a_damaged_shard_is_named_and_no_view_is_left_half_made(run, tmp_path, capsys):
    shard = run / "shards" / "000004-000005.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    for flags in (["--npz", tmp_path / "a.npz"], ["--grid", tmp_path / "grid.png"]):
        assert exit_code("export", run, *flags) == 2
        assert f"{shard.name} is damaged" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert exit_code("export", run, "--npz", tmp_path / "a.npz", "--num_samples", "4") == 0
