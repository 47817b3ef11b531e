from types import SimpleNamespace

import pytest

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


def test_the_settings_that_differ_from_the_defaults_are_named():
    sag = SelfAttentionGuidance(scale=0.5, interval=(0.5, 1.0), soft=True)
    setting = Setting(
        sampler=SamplerSettings(sampler="ddim", respacing="ddim25"),
        guidances={"sag": sag, "pag": PerturbedAttentionGuidance(site="middle")},
    )
    assert describe_changes(setting) == (
        "sampler ddim · respacing ddim25 · sag.scale 0.5 · sag.interval 0.5,1 · sag.soft true"
    )


@pytest.mark.parametrize("network", [("--model", "fashion_mnist"), ("--checkpoint", str(BUNDLED["fashion_mnist"]))])
def test_the_recommended_config_names_the_network_and_turns_off_guidance_that_its_file_recommends(
    network, tmp_path, monkeypatch
):
    config = parse_sample_config([*network, "--sag.scale", "0", "--pag.scale", "1"])
    assert parse_sample_config(["--model", "fashion_mnist"]).guidances["sag"].scale > 0
    tuning = SimpleNamespace(run=SimpleNamespace(config=config))
    best = SimpleNamespace(setting=Setting(sampler=config.sampler, guidances=config.guidances))
    monkeypatch.setattr(tuning_report, "describe_result", lambda tuning, result: [])
    (tmp_path / "recommended.yaml").write_text(format_config(tuning, SimpleNamespace(best=best)))
    again = parse_sample_config(["--config", str(tmp_path / "recommended.yaml")])
    assert again.source.checkpoint == BUNDLED["fashion_mnist"]
    assert Setting(sampler=again.sampler, guidances=again.guidances).values == best.setting.values
