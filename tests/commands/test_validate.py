import pytest

from tests.commands.test_fit import CONFIG
from tests.helpers.tiny import QUIET, QUIET_CLI, contents, exit_code, write_config

pytestmark = [*QUIET, *QUIET_CLI]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fit of two steps."""
    folder = tmp_path_factory.mktemp("validate")
    config = write_config(folder, {**CONFIG, "trainer": {**CONFIG["trainer"], "max_steps": 2}})
    assert exit_code("fit", "--config", config, "--output", folder / "run") == 0
    return folder / "run"


def said(capsys, *arguments):
    """The lines of the table that a command prints: what -> number."""
    assert exit_code(*arguments) == 0
    cells = (line.strip("│ \n").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│"))
    return {what.strip(): number.strip() for what, number in cells}


def test_a_run_is_validated_by_its_folder_alone_and_nothing_is_written(run, capsys):
    before = {path: path.read_bytes() for path in contents(run)}
    found = said(capsys, "validate", run)
    assert {"loss", "mse", "bits/dim", "at timesteps 0 to 249", "at timesteps 750 to 999"} <= found.keys()
    mean, error = map(float, found["bits/dim"].split("±"))
    assert mean > 0
    assert error > 0
    assert {path: path.read_bytes() for path in contents(run)} == before


def test_the_averages_are_looked_at_unless_the_last_weights_are_asked_for(run, capsys):
    average, raw = said(capsys, "validate", run), said(capsys, "validate", run, "--weights", "raw")
    named = said(capsys, "validate", "--config", run / "config.yaml", "--checkpoint", run / "checkpoints" / "last.ckpt")
    assert average == named
    assert average["loss"] != raw["loss"]


def test_flags_of_fit_hold_here_too(run, capsys):
    assert said(capsys, "validate", run, "--data.num_validation", "4") != said(capsys, "validate", run)


def test_a_test_is_the_same_of_other_images(run, capsys):
    found, validation = said(capsys, "test", run), said(capsys, "validate", run)
    assert found.keys() == validation.keys()
    assert found["loss"] != validation["loss"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "`run` must be a folder that sagl fit wrote, with config.yaml and checkpoints/last.ckpt"),
        ([], "--model.network, --data must be given. A --config has them"),
        (["--config", "fashion_mnist"], "`checkpoint` must be weights to look at, and none were given"),
        (["--config", "fashion_mnist", "--checkpoint", "none.ckpt"], "none.ckpt"),
    ],
)
def test_what_cannot_be_validated_is_one_line(arguments, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code("validate", *arguments) == 2
    err = capsys.readouterr().err.strip()
    assert line in err
    assert err.count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_is_validated_too(tmp_path, capsys):
    classifier = {"image_size": 32, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1]}
    classifier |= {"attention_resolutions": [16], "num_head_channels": 32, "num_classes": 10, "pool": "adaptive"}
    trainer = {**CONFIG["trainer"], "max_steps": 1}
    config = write_config(tmp_path, {"model": {"classifier": classifier}, "trainer": trainer})
    assert exit_code("fit", "--config", config, "--output", tmp_path / "run") == 0
    found = said(capsys, "validate", tmp_path / "run")
    assert {"loss", "accuracy", "accuracy top 5", "at timesteps 0 to 249"} <= found.keys()
    assert "bits/dim" not in found
