from types import SimpleNamespace

import pytest

from sagl.evaluation.study import Setting
from sagl.evaluation.tuning import Round
from sagl.evaluation.tuning_report import describe_changes, plot_rounds
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


def test_the_settings_that_are_no_defaults_are_named():
    sag = SelfAttentionGuidance(scale=0.5, interval=(0.5, 1.0), soft=True)
    setting = Setting(
        sampler=SamplerSettings(sampler="ddim", respacing="ddim25"),
        guidances={"sag": sag, "pag": PerturbedAttentionGuidance(site="middle")},
    )
    assert describe_changes(setting) == (
        "sampler ddim · respacing ddim25 · sag.scale 0.5 · sag.interval 0.5-1.0 · sag.soft True"
    )
