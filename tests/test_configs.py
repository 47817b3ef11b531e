"""Every file in configs/ is one that `sagl fit` can run: parsed with its parser, and built."""

from argparse import ArgumentError
from pathlib import Path

import pytest
import torch
import yaml

from sagl.commands.fit import FitCLI
from sagl.models.adm import UNet
from sagl.modules.diffusion_module import DiffusionModule
from tests.tiny import QUIET_CLI

pytestmark = QUIET_CLI

FILES = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def the_environment_is_left_as_it_was(monkeypatch, tmp_path):
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))


def built(file, tmp_path, *flags):
    """All that a configuration describes, built; nothing is run."""
    return FitCLI(
        DiffusionModule,
        subclass_mode_data=True,
        save_config_callback=None,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        run=False,
        args=["--config", str(file), "--output", str(tmp_path / "run"), "--trainer.accelerator", "cpu", *flags],
    )


def test_there_are_configurations():
    assert "fashion_mnist.yaml" in {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_is_parsed_and_built_as_it_says(file, tmp_path):
    said, cli = yaml.safe_load(file.read_text()), built(file, tmp_path)
    settings = cli.model.network.settings
    for name, value in said["model"]["network"].items():
        assert getattr(settings, name) == (tuple(value) if isinstance(value, list) else value), name
    assert f"{type(cli.datamodule).__module__}.{type(cli.datamodule).__name__}" == said["data"]["class_path"]
    assert cli.trainer.max_steps == said["trainer"]["max_steps"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_s_network_computes(file, tmp_path):
    network = built(file, tmp_path).model.network
    with torch.device("meta"):
        on_meta = UNet(network.settings)
        s = network.settings
        x, timesteps = torch.empty(2, s.in_channels, s.image_size, s.image_size), torch.zeros(2)
        out = on_meta(x, timesteps, torch.zeros(2, dtype=torch.long)).out
    assert out.shape == (2, s.in_channels * (1 + s.learn_sigma), s.image_size, s.image_size)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_s_rate_reaches_its_full_height_and_the_run_has_an_end(file, tmp_path):
    cli = built(file, tmp_path)
    s, end = cli.model.optimizer_settings, cli.trainer.max_steps
    assert end > s.warmup_steps + s.decay_steps
    assert max(s.rate_factor(step, end) for step in range(0, end, 50)) == 1


def test_a_misspelt_name_in_a_configuration_would_be_found(tmp_path, capsys):
    said = yaml.safe_load(FILES[0].read_text())
    said["model"]["network"]["num_chanels"] = 32
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises((SystemExit, ArgumentError)) as error:
        built(tmp_path / "wrong.yaml", tmp_path)
    assert "num_chanels" in f"{capsys.readouterr().err} {error.value}"
