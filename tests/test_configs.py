"""`sagl fit` can parse and instantiate every file in configs/."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from sagl.configuration.sample import parse_sample_config
from sagl.configuration.training import put_configs_first, training_kind, training_parser
from sagl.errors import UserError
from sagl.models.adm import Classifier
from sagl.models.checkpoints import build_network, meta_state_dict, read_checkpoint
from sagl.models.direction_head import is_same_network
from sagl.models.zoo import BUNDLED, RELEASED, get_unet_settings
from sagl.settings.compatibility import check_second_network
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.network import ClassifierSettings, UNetSettings
from tests.helpers.training import prepare_training

PAPER = {
    "imagenet256_uncond": (0.5, "output.2", 9.0),
    "imagenet256_cond": (0.2, "output.2", 9.0),
    "lsun_cat": (0.05, "output.2", 9.0),
    "lsun_horse": (0.01, "output.2", 9.0),
    "imagenet128": (0.1, "output.8", 3.0),
}
"""Table 7: scale, site, blur_sigma."""
FASHION_MNIST = ("fashion_mnist", "fashion_mnist_classifier")
HEAD = "distil_direction"
FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch, tmp_path):
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))


def instantiate(file, tmp_path):
    """Instantiate everything that a configuration describes, with the network on the meta device."""
    arguments = ["--config", str(file), "--output", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    parser = training_parser("fit", kind=training_kind(arguments), full=True)
    with torch.device("meta"):
        return prepare_training(parser, arguments)


def test_there_are_configs_of_the_papers_networks_and_of_small_images():
    assert {file.stem for file in FILES} == {*FASHION_MNIST, "emoji", "my_images", HEAD, *PAPER}


@pytest.mark.parametrize("file", [file for file in FILES if file.stem != HEAD], ids=lambda file: file.stem)
def test_a_configuration_is_instantiated_as_written(file, tmp_path):
    config, run = yaml.safe_load(file.read_text()), instantiate(file, tmp_path)
    settings = run.module.network.settings
    network = config["model"].get("network") or config["model"]["classifier"]
    if isinstance(network, str):
        use_checkpoint = config["model"].get("use_checkpoint", False)
        assert settings == replace(get_unet_settings(network)[0], use_checkpoint=use_checkpoint)
    else:
        for name, value in network.items():
            assert getattr(settings, name) == (tuple(value) if isinstance(value, list) else value), name
    assert f"{type(run.data).__module__}.{type(run.data).__name__}" == config["data"]["class_path"]
    for name, value in config["data"]["init_args"].items():
        assert getattr(run.data, name) == value, name
    assert run.trainer.max_steps == config["trainer"]["max_steps"]
    assert list(tmp_path.iterdir()) == []
    check_output_shape(run.module.network)
    optimizer, max_steps = run.module.settings.optimizer, run.trainer.max_steps
    assert max_steps == -1 or max_steps > optimizer.warmup_steps + optimizer.decay_steps
    assert max(optimizer.lr_multiplier(step, max_steps) for step in range(0, 10_000, 50)) == 1


def test_the_head_of_the_configuration_is_for_the_guidance_that_the_bundled_network_recommends(tmp_path):
    arguments = ["--config", HEAD, "--output", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    arguments = put_configs_first(arguments)
    parser = training_parser("fit", kind=training_kind(arguments), full=True)
    run = prepare_training(parser, arguments)
    recommended = parse_sample_config(["--model", "emoji"]).guidances["sag"]
    assert run.module.hparams["recommended"] == {"sag": recommended.weak_prediction_settings}
    assert is_same_network(run.module.network.settings.network_rms, build_network(read_checkpoint(BUNDLED["emoji"])))
    assert list(tmp_path.iterdir()) == []


def check_output_shape(network):
    s = network.settings
    with torch.device("meta"):
        x, timesteps = torch.empty(2, s.in_channels, s.image_size, s.image_size), torch.zeros(2)
        if isinstance(network, Classifier):
            assert network(x, timesteps).shape == (2, s.num_classes)
        else:
            out = network(x, timesteps, torch.zeros(2, dtype=torch.long)).out
            assert out.shape == (2, s.in_channels * (1 + s.learn_sigma), s.image_size, s.image_size)


@pytest.mark.parametrize("name", PAPER)
def test_networks_of_the_paper_are_sampled_with_the_settings_of_table_7(name):
    scale, site, blur_sigma = PAPER[name]
    expected = SelfAttentionGuidance(scale=scale, site=site, threshold=1.0, blur_sigma=blur_sigma, kernel_size=31)
    for flags in (["--config", name], ["--model", name]):
        config = parse_sample_config(flags)
        assert config.source.model == name
        assert config.source.network == RELEASED[name].settings
        assert config.guidances["sag"] == expected
        assert (config.sampler.sampler, config.sampler.respacing) == ("ddpm", "250")
        classifier = ("imagenet128_classifier", 0.5) if name == "imagenet128" else (None, 0.0)
        assert (config.guidances["classifier"].checkpoint, config.guidances["classifier"].scale) == classifier


@pytest.mark.parametrize("name", PAPER)
def test_networks_of_the_paper_are_trained_with_adms_settings(name, tmp_path):
    run = instantiate(FILES[0].with_name(f"{name}.yaml"), tmp_path)
    optimizer, diffusion = run.module.settings.optimizer, run.module.diffusion_settings
    assert (optimizer.learning_rate, optimizer.weight_decay) == (1e-4, 0.0)
    assert (diffusion.noise_schedule, diffusion.num_timesteps) == ("linear", 1000)
    assert run.module.hparams["ema_decay"] == 0.9999
    assert run.data.batch_size * run.trainer.accumulate_grad_batches == 256
    assert run.module.network.settings.dropout == (0.1 if name.startswith("lsun") else 0.0)


def test_the_configuration_of_the_bundled_network_recommends_what_its_file_does():
    by_config, by_file = (
        parse_sample_config(["--config", "fashion_mnist", "--checkpoint", str(BUNDLED["fashion_mnist"])]),
        parse_sample_config(["--model", "fashion_mnist"]),
    )
    assert (by_config.sampler, by_config.guidances["sag"], by_config.samples) == (
        by_file.sampler,
        by_file.guidances["sag"],
        by_file.samples,
    )


def test_the_classifier_configuration_has_the_process_of_the_bundled_network_and_is_small():
    network, classifier = (
        yaml.safe_load((FILES[0].with_name(f"{name}.yaml")).read_text())["model"] for name in FASHION_MNIST
    )
    assert classifier["diffusion"] == network["diffusion"]
    settings = ClassifierSettings(**classifier["classifier"])
    check_second_network(
        "classifier.checkpoint", settings, DiffusionSettings(), UNetSettings(**network["network"]), DiffusionSettings()
    )
    assert sum(tensor.numel() for tensor in meta_state_dict(settings).values()) <= 1.3e6


def test_a_misspelt_name_in_a_configuration_is_refused(tmp_path):
    config = yaml.safe_load(FILES[0].with_name("emoji.yaml").read_text())
    config["model"]["network"]["num_chanels"] = 32
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="num_chanels"):
        instantiate(tmp_path / "wrong.yaml", tmp_path)
