"""benchmarks/methods.py: the table of guidance methods at equal cost, and its figure."""

import json

import pytest
from PIL import Image

from benchmarks.methods import METHODS, main, search_values
from sagl.commands.tune import parse_search
from sagl.configuration.sample import parse_sample_config, sample_parser
from sagl.models.checkpoints import write_checkpoint
from sagl.sampling.run import SamplingRun
from tests.helpers.extractors import use_fast_extractors, write_npz
from tests.helpers.networks import grey_weights


@pytest.fixture(scope="module")
def run():
    return SamplingRun.without_folder(parse_sample_config(["--model", "fashion_mnist"], sample_parser()))


@pytest.mark.parametrize("method", METHODS)
def test_the_values_to_try_are_settings_of_the_method(method, run):
    space = parse_search([(key, *values) for key, values in search_values(method, run).items()])
    assert [len(values) for key, values in space.items() if key.endswith(".scale")] in ([4], [5])


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """A short comparison of methods on a tiny network, with 20 resamples."""
    use_fast_extractors(monkeypatch, tmp_path / "cache")
    write_checkpoint(grey_weights(), tmp_path / "network.safetensors")
    write_npz(tmp_path / "real.npz", 30, 1, size=8)
    flags = ["--checkpoint", tmp_path / "network.safetensors", "--reference", tmp_path / "real.npz", "--labels", "null"]
    flags += ["--num_samples", 8, "--choice_samples", 4, "--batch_size", 4, "--bootstrap", 20, "--progress", "off"]
    flags += ["--sampler", "ddim", "--respacing", 2, "--trainer.accelerator", "cpu", "--output", tmp_path / "out"]
    return [*map(str, flags), "--methods"]


def test_without_resamples_the_table_and_the_figure_have_no_intervals(flags, tmp_path):
    main([*flags, "history, previous step", "--bootstrap", "0"])
    assert "(" not in (tmp_path / "out/methods.md").read_text()
    assert (tmp_path / "out/methods.png").exists()


def test_the_best_scale_of_each_method_is_reported_beside_plain_sampling_at_equal_cost(flags, tmp_path, capsys):
    methods = ["PAG", "history, previous step"]
    main([*flags, *methods])
    results = json.loads((tmp_path / "out/methods.json").read_text())
    assert list(results) == methods
    assert [results[name]["guided"]["nfe"] for name in methods] == [4, 2]
    for result in results.values():
        unguided, guided, plain = (result[name] for name in ("unguided", "guided", "plain"))
        assert guided["nfe"] == plain["nfe"] >= unguided["nfe"]
        assert guided["from_plain"][0] == pytest.approx(guided["fd"] - plain["fd"])
        assert guided["from_unguided"][0] == pytest.approx(guided["fd"] - unguided["fd"])
    table = (tmp_path / "out/methods.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| plain sampling"] * 2 + [
        f"| {m}" for m in methods
    ]
    with Image.open(tmp_path / "out/methods.png") as picture:
        picture.verify()
