import csv
import json
import re
import shutil
from dataclasses import asdict
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import yaml

from sagl.commands.tune import parse_search, tune_parser
from sagl.configuration.sample import parse_sample_config
from sagl.evaluation.study import Study
from sagl.evaluation.tuning import make_candidates
from sagl.models.checkpoints import write_checkpoint
from sagl.sampling.run import SamplingRun
from tests.helpers.commands import exit_code, refusal
from tests.helpers.errors import refused
from tests.helpers.extractors import serve_files, use_fast_extractors, write_npz
from tests.helpers.networks import grey_weights

SEARCH = ["--search", "sag.scale", 0.1, 0.5, 1, "--search", "sag.site", "middle", "output.1"]
SEARCH += ["--search", "sag.interval", "0,1", "--search", "sag.blur_sigma", 1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a network and real images."""
    folder = tmp_path_factory.mktemp("inputs")
    write_checkpoint(grey_weights(), folder / "network.safetensors")
    write_npz(folder / "real.npz", 30, 1, size=8)
    return folder


def search_in(inputs):
    """Return a search over six candidates without its folder: rounds of 6, 3 and 2 over 4, 8 and 16 images."""
    flags = ["--checkpoint", inputs / "network.safetensors", "--reference", inputs / "real.npz", "--first_id", 8]
    flags += ["--num_samples", 4, "--batch_size", 4, "--report_samples", 8, "--bootstrap", 20, "--labels", "balanced"]
    flags += ["--sampler", "ddim", "--respacing", 2, "--trainer.accelerator", "cpu", "--progress", "off"]
    return ["tune", *flags, *SEARCH, "--output"]


@pytest.fixture
def arguments(inputs, tmp_path, monkeypatch):
    use_fast_extractors(monkeypatch, tmp_path / "cache")
    return search_in(inputs)


@pytest.fixture(scope="module")
def search(inputs, tmp_path_factory):
    """The folder of a search that was not interrupted, and its batches."""
    folder = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        use_fast_extractors(patch, folder / "cache")
        batches = count_batches(patch)
        assert exit_code(*search_in(inputs), folder / "a") == 0
    return SimpleNamespace(folder=folder / "a", batches=batches)


def results(folder):
    return json.loads((folder / "tuning.json").read_text())


def count_batches(monkeypatch, fail_at=None):
    """Return a list of all batches that are sampled; the one of number `fail_at` fails."""
    batches, compute = [], Study._compute_features

    def count(study, setting, batch):
        if len(batches) == fail_at:
            raise KeyboardInterrupt
        batches.append((str(setting.values), batch[0]))
        return compute(study, setting, batch)

    monkeypatch.setattr(Study, "_compute_features", count)
    return batches


def test_the_better_half_of_the_candidates_goes_on_and_the_best_is_reported_on_other_ids(search):
    result = results(search.folder)
    rounds = result["rounds"]
    assert [(len(r["distances"]), r["ids"]) for r in rounds] == [(6, [8, 12]), (3, [8, 16]), (2, [8, 24])]
    for earlier, later in pairwise(rounds):
        ranking = sorted(earlier["distances"], key=earlier["distances"].get)
        assert list(later["distances"]) == ranking[: len(later["distances"])]
    best = min(rounds[-1]["distances"], key=rounds[-1]["distances"].get)
    assert result["report"]["recommended"]["setting"] == result["candidates"][int(best)]
    assert result["report_ids"] == [24, 32]
    assert [result["report"][name]["nfe"] for name in ("unguided", "recommended", "plain")] == [2, 4, 4]


def test_the_announced_evaluations_are_those_of_whole_batches(tmp_path, arguments, monkeypatch, capsys):
    nfe, compute = [], Study._compute_features

    def count(study, setting, batch):
        nfe.append(study.pipeline_for(setting).nfe * len(batch))
        return compute(study, setting, batch)

    monkeypatch.setattr(Study, "_compute_features", count)
    assert exit_code(*arguments, tmp_path / "a", "--batch_size", 3) == 0
    announced = int(re.search(r"most ([\d,]+) network evaluations", capsys.readouterr().out)[1].replace(",", ""))
    assert announced == sum(nfe) > 0


def test_the_recommended_config_gives_the_best_candidate_to_sample(search, inputs, tmp_path):
    config = parse_sample_config(["--config", str(search.folder / "recommended.yaml"), "--output", str(tmp_path / "b")])
    best = results(search.folder)["report"]["recommended"]["setting"]
    assert json.loads(json.dumps(vars(config.guidances["sag"]))) == best["sag"]
    assert (config.sampler.sampler, config.sampler.respacing, config.samples.labels) == ("ddim", "2", "balanced")
    assert config.source.checkpoint == inputs / "network.safetensors"
    rows = list(csv.DictReader((search.folder / "candidates.csv").read_text().splitlines()))
    assert (len(rows), float(rows[0]["sag.scale"]), rows[0]["sag.site"]) == (
        6,
        best["sag"]["scale"],
        best["sag"]["site"],
    )
    assert "<polyline" in (search.folder / "tuning.html").read_text()


def test_a_search_that_is_interrupted_twice_samples_no_batch_twice_and_ends_alike(
    search, tmp_path, arguments, monkeypatch
):
    batches = []
    for fail_at in (5, 9, None):
        with monkeypatch.context() as patch:
            new = count_batches(patch, fail_at)
            try:
                assert exit_code(*arguments, tmp_path / "parts") == 0
            except KeyboardInterrupt:
                assert fail_at is not None
            batches += new
    assert sorted(batches) == sorted(search.batches) == sorted(set(search.batches))
    assert results(tmp_path / "parts") == results(search.folder)


def test_a_repeated_command_finds_its_features_on_a_machine_with_less_free_memory(
    tmp_path, arguments, monkeypatch, capsys
):
    sizes = iter((3, 2))
    monkeypatch.setattr("sagl.sampling.choices.default_batch_size", lambda *_: next(sizes))
    assert exit_code(*arguments, tmp_path / "a", "--batch_size", "null", "--candidates", 2) == 0
    batches = count_batches(monkeypatch)
    assert exit_code(*arguments, tmp_path / "a", "--batch_size", "null", "--candidates", 2) == 0
    assert (batches, next(sizes, None)) == ([], None)
    assert capsys.readouterr().out.count("--batch_size 3 ") == 2


def test_the_configured_guidance_is_a_candidate_and_the_number_of_others_is_limited(tmp_path, arguments, capsys):
    flags = ("--sag.scale", 0.7, "--sag.site", "input.1", "--candidates", 3, "--dry_run")
    assert exit_code(*arguments, tmp_path / "a", *flags) == 0
    assert capsys.readouterr().out.startswith("3 candidates")
    assert not (tmp_path / "a" / "tuning.json").exists()
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"sag": {"scale": 0.7, "site": "input.1"}}))
    assert exit_code(*arguments, tmp_path / "b", "--config", config, "--candidates", 1) == 0
    assert results(tmp_path / "b")["candidates"][0]["sag"]["scale"] == 0.7


def test_the_report_compares_the_best_candidate_with_the_configured_guidance_on_the_same_ids(
    search, tmp_path, arguments
):
    shutil.copytree(search.folder, tmp_path / "a")
    assert results(tmp_path / "a")["difference_from_configured"] is None
    assert exit_code(*arguments, tmp_path / "a", "--sag.scale", 30, "--sag.site", "input.1") == 0
    result = results(tmp_path / "a")
    report = result["report"]
    assert (report["configured"]["setting"]["sag"]["scale"], report["configured"]["nfe"]) == (30, 4)
    difference = report["recommended"]["fd"] - report["configured"]["fd"]
    assert result["difference_from_configured"][0] == pytest.approx(difference) != 0
    assert "that of the configured guidance" in (tmp_path / "a" / "recommended.yaml").read_text()


def test_the_recommended_config_describes_a_network_that_the_weight_file_does_not(tmp_path, arguments):
    network = grey_weights()
    torch.save(dict(network.state_dict), tmp_path / "grey.pt")
    model = {"network": json.loads(json.dumps(asdict(network.model_settings))), "diffusion": {"num_timesteps": 50}}
    (tmp_path / "grey.yaml").write_text(yaml.safe_dump({"model": model}))
    flags = ("--config", tmp_path / "grey.yaml", "--checkpoint", tmp_path / "grey.pt", "--candidates", 2)
    assert exit_code(*arguments, tmp_path / "a", *flags) == 0
    source = parse_sample_config(["--config", str(tmp_path / "a" / "recommended.yaml")]).source
    assert (source.network, source.checkpoint) == (network.model_settings, tmp_path / "grey.pt")
    assert source.diffusion.num_timesteps == 50


def test_a_report_says_that_the_configured_guidance_is_the_best(tmp_path, arguments):
    without_search = arguments[: arguments.index("--search")]
    only = ("--search", "sag.scale", 0.5, "--sag.scale", 0.5, "--sag.site", "input.1", "--output", tmp_path / "a")
    assert exit_code(*without_search, *only, "--candidates", 1) == 0
    assert "The recommended setting is the configured one." in (tmp_path / "a" / "recommended.yaml").read_text()
    assert results(tmp_path / "a")["difference_from_configured"][0] == 0


def test_a_statistics_file_at_a_url_gives_the_reference_and_the_extractor(inputs, tmp_path, arguments, monkeypatch):
    statistics = ("--extractor", "inception", "--output", tmp_path / "s.npz")
    assert exit_code("statistics", inputs / "real.npz", *statistics) == 0
    assert exit_code(*arguments, tmp_path / "file", "--candidates", 2, "--reference", tmp_path / "s.npz") == 0
    serve_files(monkeypatch, tmp_path)
    assert exit_code(*arguments, tmp_path / "url", "--candidates", 2, "--reference", "https://host/s.npz") == 0
    result = results(tmp_path / "url")
    assert (result["extractor"], result["reference"]) == ("inception", "https://host/s.npz")
    assert result["rounds"] == results(tmp_path / "file")["rounds"]


def test_candidates_whose_images_are_not_finite_are_the_last_of_the_first_round(tmp_path, arguments):
    without_search = arguments[: arguments.index("--search")]
    flags = [
        "--search",
        "sag.scale",
        0.1,
        0.5,
        1e300,
        "--sag.scale",
        1e301,
        "--sag.site",
        "middle",
        "--clip_x0",
        "false",
    ]
    flags += ["--search", "sag.site", "middle", "--search", "sag.interval", "0,1", "--search", "sag.blur_sigma", 1]
    assert exit_code(*without_search, "--output", tmp_path, *flags) == 0
    result = json.loads((tmp_path / "tuning.json").read_text(), parse_constant=pytest.fail)
    scales = [candidate["sag"]["scale"] for candidate in result["candidates"]]
    overflowed = [scales.index(scale) for scale in (1e301, 1e300)]
    assert [result["rounds"][0]["distances"][str(number)] for number in overflowed] == [None, None]
    assert len(result["rounds"][1]["distances"]) == 2
    assert None not in result["rounds"][1]["distances"].values()
    assert (result["report"]["configured"]["fd"], result["difference_from_configured"]) == (None, None)
    page = (tmp_path / "tuning.html").read_text()
    assert page.count("not finite") >= 3  # both candidates, and the configured guidance
    assert not re.search(r"\b(inf|nan)\b", page)
    rows = list(csv.DictReader((tmp_path / "candidates.csv").read_text().splitlines()))
    assert [float(row["sag.scale"]) for row in rows[2:]] == [scales[number] for number in sorted(overflowed)]


def test_a_search_without_a_candidate_of_finite_images_is_refused(tmp_path, arguments, capsys):
    without_search = arguments[: arguments.index("--search")]
    flags = ("--search", "sag.scale", 1e300, "--search", "sag.site", "middle", "--clip_x0", "false")
    assert exit_code(*without_search, "--output", tmp_path, *flags) == 2
    assert "--search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--search", "sag.size", 1), ("--search", "sag.size")),
        (("--search", "sag.scale"), ("--search", "sag.scale")),
        (("--search", "sag.scale", "much"), ("sag.scale", "much")),
        (("--search", "sag.site", "output.9"), ("sag.site", "output.9")),
        (("--search", "sag.scale", 0), ("--search", "0.0")),
        (("--method", "fog"), ("--method", "fog")),
        (("--num_samples", 1), ("--num_samples", "1")),
        (("--bootstrap", 5), ("--bootstrap", "5")),
        (("--reference", "nowhere"), ("--reference", "nowhere")),
        (("--extractor", "nothing"), ("--extractor", "nothing")),
    ],
)
def test_a_search_that_cannot_be_done_is_refused_in_one_line(flags, parts, tmp_path, arguments, capsys):
    without_search = arguments[: arguments.index("--search")]
    refusal(capsys, tmp_path, *without_search, "--output", tmp_path / "a", *flags, names=parts)


def test_the_bundled_classifier_guides_candidates_that_name_none():
    config = parse_sample_config(["--model", "fashion_mnist", "--labels", "balanced"], tune_parser())
    run = SamplingRun.without_folder(config)
    *_, candidate = make_candidates(run, {"classifier.scale": (1.0,)}, 10)
    assert candidate.guidances["classifier"].checkpoint == "fashion_mnist_classifier"


@pytest.mark.parametrize(
    ("search", "part"),
    [
        ([["sag.scale", "1"], ["sag.scale", "2"]], "sag.scale"),
        ([["sag.scale"]], "sag.scale"),
        ([["scale", "1"]], "'scale'"),
    ],
)
def test_a_search_names_every_setting_once_with_values(search, part):
    with refused("`search`", part):
        parse_search(search)
