import pytest

from sagl.configuration.training import put_configs_first, training_kind, training_parser
from sagl.errors import UserError


def test_the_help_is_two_screens():
    lines = training_parser("fit").format_help().splitlines()
    assert len(lines) <= 78
    assert max(map(len, lines)) <= 120


def test_the_full_help_has_the_options_of_the_short_one_and_of_lightning():
    short, full = training_parser("fit"), training_parser("fit", full=True)
    assert set(short.options) < set(full.options)
    assert {"--data", "--trainer.max_steps", "--preview.num_samples", "--sag.scale"} <= set(full.options)
    assert all(option in full.format_help() for option in full.options if option.startswith("--"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "network"),
        (["--config", "fashion_mnist", "--sag.scale", "0.1"], "network"),
        (["--config", "lsun_cat", "--classifier.scale=1"], "network"),
        (["--config", "fashion_mnist_classifier"], "classifier"),
        (["--model.classifier=imagenet64_classifier"], "classifier"),
        (["--config", "distil_direction"], "direction_head"),
        (["--model.direction_head.method", "pag"], "direction_head"),
    ],
)
def test_what_is_trained_follows_from_the_command_line_or_its_config(arguments, expected):
    assert training_kind(arguments) == expected


@pytest.mark.parametrize("config", [["--config", "fashion_mnist"], ["--config=fashion_mnist"]])
def test_a_flag_replaces_the_value_of_a_config_on_either_side_of_it(config):
    flag, parser = ["--ema_decay", "0.5"], training_parser("fit", full=True)
    assert parser.parse(put_configs_first(config)).ema_decay == 0.999
    for arguments in ([*flag, *config], [*config, *flag]):
        assert parser.parse(put_configs_first(arguments)).ema_decay == 0.5


def test_every_config_of_a_training_is_checked(tmp_path):
    for name, text in {"a.yaml": "model: {classifier: {}}", "b.yaml": "seed: 1\nseed: 2"}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="seed"):
        training_kind(["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")])
