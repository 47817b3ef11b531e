import pytest

from sagl.settings.sampling import DeviceSettings, RunSettings, SamplerSettings
from tests.helpers.errors import refused


@pytest.mark.parametrize(
    ("settings", "changes", "name"),
    [
        (SamplerSettings, {"sampler": "euler"}, "sampler"),
        (SamplerSettings, {"sampler": "ddim", "eta": -0.1}, "eta"),
        (SamplerSettings, {"sampler": "ddim", "eta": 1.5}, "eta"),
        (SamplerSettings, {"sampler": "ddim", "eta": float("nan")}, "eta"),
        (SamplerSettings, {"sampler": "ddpm", "eta": 0.5}, "eta"),
        (SamplerSettings, {"sampler": "heun", "eta": 0.5}, "eta"),
        (RunSettings, {"num_samples": 0}, "num_samples"),
        (RunSettings, {"num_samples": 10_000_001}, "num_samples"),
        (RunSettings, {"batch_size": 0}, "batch_size"),
        (RunSettings, {"batch_size": 65_537}, "batch_size"),
        (RunSettings, {"first_id": -1}, "first_id"),
        (RunSettings, {"first_id": 2**32 - 15}, "first_id"),
        (RunSettings, {"seed": -1}, "seed"),
        (RunSettings, {"labels": "shoes"}, "labels"),
        (RunSettings, {"labels": "1,,2"}, "labels"),
        (RunSettings, {"labels": "-1"}, "labels"),
        (RunSettings, {"labels": "٣"}, "labels"),
        (RunSettings, {"labels": "1,²"}, "labels"),
        (DeviceSettings, {"devices": "0"}, "trainer.devices"),
        (DeviceSettings, {"devices": "257"}, "trainer.devices"),
        (DeviceSettings, {"devices": "0,1"}, "trainer.devices"),
        (DeviceSettings, {"num_nodes": 0}, "trainer.num_nodes"),
    ],
)
def test_an_impossible_setting_is_refused_with_its_name_and_value(settings, changes, name):
    with refused(f"`{name}`", list(changes.values())[-1]):
        settings(**changes)


@pytest.mark.parametrize(("settings", "name"), [(RunSettings, "labels"), (DeviceSettings, "devices")])
def test_a_text_of_thousands_of_digits_is_no_number(settings, name):
    with refused(name, "999"):
        settings(**{name: "9" * 5000})


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_takes_any_fraction_of_the_ancestral_noise(eta):
    assert SamplerSettings(sampler="ddim", eta=eta).eta == eta


def test_labels_may_be_a_list_of_classes():
    assert RunSettings(labels="0, 7,9").label_list == [0, 7, 9]


def test_ids_reach_the_last_of_32_bits():
    assert RunSettings(first_id=2**32 - 16).first_id == 2**32 - 16
