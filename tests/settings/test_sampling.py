import pytest

from sagl.errors import UserError
from sagl.settings.sampling import DeviceSettings, RunSettings, SamplerSettings


@pytest.mark.parametrize(
    ("settings", "changes", "named"),
    [
        (SamplerSettings, {"sampler": "euler"}, "sampler"),
        (SamplerSettings, {"sampler": "ddim", "eta": -0.1}, "eta"),
        (SamplerSettings, {"sampler": "ddim", "eta": 1.5}, "eta"),
        (SamplerSettings, {"sampler": "ddpm", "eta": 0.5}, "eta"),
        (RunSettings, {"num_samples": 0}, "num_samples"),
        (DeviceSettings, {"devices": "0"}, "trainer.devices"),
        (DeviceSettings, {"devices": "257"}, "trainer.devices"),
        (DeviceSettings, {"devices": "0,1"}, "trainer.devices"),
        (DeviceSettings, {"num_nodes": 0}, "trainer.num_nodes"),
        (RunSettings, {"batch_size": 0}, "batch_size"),
        (RunSettings, {"first_id": -1}, "first_id"),
        (RunSettings, {"seed": -1}, "seed"),
        (RunSettings, {"labels": "shoes"}, "labels"),
        (RunSettings, {"labels": "1,,2"}, "labels"),
        (RunSettings, {"labels": "-1"}, "labels"),
    ],
)
def test_what_has_no_chain_or_run_is_refused_with_the_argument_and_what_came(settings, changes, named):
    with pytest.raises(UserError) as error:
        settings(**changes)
    assert f"`{named}`" in str(error.value)
    assert str(list(changes.values())[-1]) in str(error.value)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_takes_any_share_of_the_ancestral_noise(eta):
    assert SamplerSettings(sampler="ddim", eta=eta).eta == eta


def test_labels_may_be_a_list_of_classes():
    assert RunSettings(labels="0, 7,9").label_list == [0, 7, 9]
