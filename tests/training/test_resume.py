import pytest
import yaml

from sagl.errors import UserError
from sagl.training.resume import changed_settings, check_same_parameters
from tests.helpers.errors import refused

HPARAMS = {"network": {"num_channels": 32, "channel_mult": (1, 2), "dropout": 0.0}, "freeze": ()}
HPARAMS["diffusion"] = {"noise_schedule": "linear", "num_timesteps": 1000}
HEAD = {"width": 8, "network_rms": (0.5, 0.0, 1.25)}
"""Hyperparameters of a direction head of a network with three tensors."""
HEAD_HPARAMS = {"direction_head": HEAD, "diffusion": HPARAMS["diffusion"]}


def test_changed_settings_are_listed_by_full_names_with_both_values(tmp_path):
    config = {
        "output": "a",
        "resume": False,
        "model": {"seed": 0, "optimizer": {"betas": [0.9, 0.99]}},
        "preview": None,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    new = {"output": "b", "resume": True, "model": {"seed": 1, "optimizer": {"betas": [0.9, 0.99]}}, "ema_decay": 0.9}
    changes = changed_settings(tmp_path / "config.yaml", yaml.safe_dump(new))
    assert sorted(changes) == ["ema_decay 0.9 (was None)", "model.seed 1 (was 0)"]
    assert changed_settings(tmp_path / "absent.yaml", yaml.safe_dump(new)) == []


@pytest.mark.parametrize("name", ["checkpoint", "weights"])
def test_other_initial_weights_are_refused_because_a_resumed_training_does_not_read_them(name, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({name: "a"}))
    with pytest.raises(UserError, match=f"`{name}` .* a, .* got None"):
        changed_settings(tmp_path / "config.yaml", yaml.safe_dump({name: None}))


def test_the_network_and_the_trained_parameters_must_stay_the_same():
    loaded = HPARAMS | {"network": {"num_channels": 32, "channel_mult": [1, 2]}, "freeze": []}  # of an older version
    check_same_parameters(HPARAMS, HPARAMS)
    check_same_parameters(loaded, HPARAMS | {"network": HPARAMS["network"] | {"dropout": 0.1}})


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"network": HPARAMS["network"] | {"num_channels": 64}}, "model.network.num_channels"),
        ({"network": HPARAMS["network"] | {"channel_mult": (1, 2, 3)}}, "model.network.channel_mult"),
        ({"diffusion": HPARAMS["diffusion"] | {"num_timesteps": 500}}, "model.diffusion.num_timesteps"),
        ({"freeze": ("input_blocks.*",)}, "model.freeze"),
        ({"network": None, "classifier": {}}, "model."),
    ],
)
def test_another_network_process_or_other_frozen_parts_are_refused_by_name(changed, name):
    with pytest.raises(UserError, match=f"`{name}"):
        check_same_parameters(HPARAMS, HPARAMS | changed)


@pytest.mark.parametrize("rounding", [1e-7, -1e-7, 2**-9])
def test_a_head_is_resumed_whatever_the_rounding_of_its_networks_root_mean_squares(rounding):
    changed = [value * (1 + rounding) for value in HEAD["network_rms"]]
    check_same_parameters(HEAD_HPARAMS, HEAD_HPARAMS | {"direction_head": HEAD | {"network_rms": changed}})


@pytest.mark.parametrize("changed", [(0.5, 0.0, 1.27), (0.5, 0.1, 1.25), (0.5, 0.0), (0.5, 0.0, float("nan"))])
def test_a_head_of_another_network_is_not_resumed(changed):
    with refused("`checkpoint`", "another"):
        check_same_parameters(HEAD_HPARAMS, HEAD_HPARAMS | {"direction_head": HEAD | {"network_rms": changed}})


@pytest.mark.parametrize(
    "content", [b"[", b"- a", b"3", b"a: !!python/name:os.system", b"[" * 3000], ids=lambda c: str(c)[:20]
)
def test_a_damaged_configuration_of_the_run_is_refused(content, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    with refused("`output`", "config.yaml"):
        changed_settings(tmp_path / "config.yaml", "seed: 1")
