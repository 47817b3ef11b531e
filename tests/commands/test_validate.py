import pytest

from tests.commands.test_fit import CONFIG, TRAINER
from tests.commands.test_fit_classifier import CLASSIFIER
from tests.helpers.commands import exit_code, refusal
from tests.helpers.files import contents, write_fashion_mnist_config
from tests.helpers.training import IGNORED_WARNINGS

pytestmark = IGNORED_WARNINGS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a fit of two steps."""
    folder = tmp_path_factory.mktemp("validate")
    config = write_fashion_mnist_config(folder, {**CONFIG, "trainer": {**TRAINER, "max_steps": 2}})
    assert exit_code("fit", "--config", config, "--output", folder / "run") == 0
    return folder / "run"


def table(capsys, *arguments):
    """The table that a command prints: name -> value."""
    assert exit_code(*arguments) == 0
    cells = (line.strip("│ \n").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│"))
    return {name.strip(): value.strip() for name, value in cells}


def test_a_run_is_validated_by_its_folder_and_nothing_is_written(run, capsys):
    before = contents(run)
    rows = table(capsys, "validate", run)
    assert {"loss", "mse", "bits/dim", "at timesteps 0 to 249", "at timesteps 750 to 999"} <= rows.keys()
    mean, error = map(float, rows["bits/dim"].split("±"))
    assert mean > 0
    assert error > 0
    assert contents(run) == before
    other = table(capsys, "test", run)
    assert other.keys() == rows.keys()
    assert other["loss"] != rows["loss"]


def test_the_ema_weights_are_validated_unless_others_are_requested(run, capsys):
    average, raw = table(capsys, "validate", run), table(capsys, "validate", run, "--weights", "raw")
    config, checkpoint = run / "config.yaml", run / "checkpoints" / "last.ckpt"
    assert average == table(capsys, "validate", "--config", config, "--checkpoint", checkpoint)
    assert average["loss"] != raw["loss"]


def test_the_folder_of_a_run_may_follow_the_options(run, capsys):
    options = ["--trainer.accelerator", "cpu", "--data.num_validation=4"]
    assert table(capsys, "validate", *options, run) == table(capsys, "validate", run, *options)


def test_options_of_fit_are_accepted(run, capsys):
    assert table(capsys, "validate", run, "--data.num_validation", "4") != table(capsys, "validate", run)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["model.network", "data", "--config"]),
        (["--config", "fashion_mnist"], ["checkpoint"]),
    ],
)
def test_a_validation_without_config_or_checkpoint_is_refused(arguments, names, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(capsys, tmp_path, "validate", *arguments, names=names)


def test_a_validation_without_images_is_refused(run, capsys, tmp_path):
    arguments = [run, "--data.num_validation", "0"]
    refusal(capsys, tmp_path, "validate", *arguments, names=["`data.num_validation`", "0"])
    assert exit_code("test", *arguments) == 0


def test_a_classifier_is_validated(tmp_path, capsys):
    model, trainer = {"classifier": {**CLASSIFIER, "pool": "adaptive"}}, {**TRAINER, "max_steps": 1}
    config = write_fashion_mnist_config(tmp_path, {"model": model, "trainer": trainer})
    assert exit_code("fit", "--config", config, "--output", tmp_path / "run") == 0
    rows = table(capsys, "validate", tmp_path / "run")
    assert {"loss", "accuracy", "accuracy top 5", "at timesteps 0 to 249"} <= rows.keys()
    assert "bits/dim" not in rows
