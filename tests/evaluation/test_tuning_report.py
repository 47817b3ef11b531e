import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from sagl.configuration.sample import parse_sample_config
from sagl.evaluation import tuning_report
from sagl.evaluation.study import Setting
from sagl.evaluation.tuning import Round
from sagl.evaluation.tuning_report import describe_changes, format_config, plot_rounds
from sagl.models.zoo import BUNDLED
from sagl.settings.guidance import PerturbedAttentionGuidance, SelfAttentionGuidance
from sagl.settings.sampling import SamplerSettings

FIRST = Round(ids=range(60), unguided=100.0, distances={0: 20.0, 1: 10.0, 2: 70.0, 3: 400.0})
SECOND = Round(ids=range(120), unguided=80.0, distances={0: 50.0, 1: 40.0})


@pytest.mark.parametrize("rounds", [[FIRST], [FIRST, SECOND]])
def test_a_plot_of_the_rounds_holds_every_candidate_but_the_worst_of_the_first_round(rounds):
    tuning = SimpleNamespace(candidates=[Setting(sampler=SamplerSettings())] * 4, space={})
    plot = plot_rounds(tuning, SimpleNamespace(rounds=rounds))
    low, high = plot.y_range
    outside = [y for line in plot.lines for _, y in line.points if not low <= y <= high]
    assert outside == ([300.0] if len(rounds) == 2 else [])
    (best,) = [line for line in plot.lines if line.best]
    assert best.points == [(60, -90.0), (120, -40.0)][: len(rounds)]


def test_a_candidate_whose_images_are_not_finite_is_not_drawn():
    first = replace(FIRST, distances={**FIRST.distances, 3: math.inf})
    tuning = SimpleNamespace(candidates=[Setting(sampler=SamplerSettings())] * 4, space={})
    plot = plot_rounds(tuning, SimpleNamespace(rounds=[first]))
    assert sorted(line.points for line in plot.lines) == [[(60.0, -90.0)], [(60.0, -80.0)], [(60.0, -30.0)]]
    assert all(map(math.isfinite, plot.y_range))


def test_the_settings_that_differ_from_the_defaults_are_named():
    sag = SelfAttentionGuidance(scale=0.5, interval=(0.5, 1.0), soft=True)
    setting = Setting(
        sampler=SamplerSettings(sampler="ddim", respacing="ddim25"),
        guidances={"sag": sag, "pag": PerturbedAttentionGuidance(site="middle")},
    )
    assert describe_changes(setting) == (
        "sampler ddim · respacing ddim25 · sag.scale 0.5 · sag.interval 0.5,1 · sag.soft true"
    )


def recommended(monkeypatch, *flags):
    """Return the recommended config of a search whose best candidate is the configured guidance."""
    config = parse_sample_config(list(flags))
    best = SimpleNamespace(setting=Setting(sampler=config.sampler, guidances=config.guidances))
    tuning = SimpleNamespace(run=SimpleNamespace(config=config))
    monkeypatch.setattr(tuning_report, "describe_result", lambda tuning, result: [])
    return format_config(tuning, SimpleNamespace(best=best))


def test_the_recommended_config_has_absolute_paths_and_names_as_they_are(tmp_path, monkeypatch):
    (tmp_path / "weak.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "fashion_mnist", "--autoguidance.scale", "1", "--autoguidance.checkpoint", "weak.safetensors"]
    flags += ["--sag.scale", "1", "--sag.direction_head", "auto", "--classifier.scale", "1"]
    settings = yaml.safe_load(recommended(monkeypatch, *flags))
    assert settings["autoguidance"]["checkpoint"] == str(tmp_path / "weak.safetensors")
    assert settings["sag"]["direction_head"] == "auto"
    assert settings["classifier"]["checkpoint"] == "fashion_mnist_classifier"


@pytest.mark.parametrize("network", [("--model", "fashion_mnist"), ("--checkpoint", str(BUNDLED["fashion_mnist"]))])
def test_the_recommended_config_names_the_network_and_turns_off_guidance_that_its_file_recommends(
    network, tmp_path, monkeypatch
):
    assert parse_sample_config(["--model", "fashion_mnist"]).guidances["sag"].scale > 0
    flags = (*network, "--sag.scale", "0", "--pag.scale", "1")
    (tmp_path / "recommended.yaml").write_text(recommended(monkeypatch, *flags))
    best = parse_sample_config([*flags])
    again = parse_sample_config(["--config", str(tmp_path / "recommended.yaml")])
    assert again.source.checkpoint == BUNDLED["fashion_mnist"]
    values = [Setting(sampler=config.sampler, guidances=config.guidances).values for config in (best, again)]
    assert values[0] == values[1]
