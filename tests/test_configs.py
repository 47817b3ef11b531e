"""Every file in configs/ is one that `sagl fit` can run: parsed with its parser, and built."""

from pathlib import Path

import pytest
import torch
import yaml

from sagl.commands.fit import training_parser, trains_classifier
from sagl.commands.request import parse
from sagl.commands.training import prepare_fit
from sagl.errors import UserError
from sagl.models.adm import Classifier
from sagl.models.checkpoints import meta_state_dict
from sagl.models.zoo import DEFAULT_CHECKPOINT, RELEASED, get_unet_settings
from sagl.settings.compatibility import check_classifier
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.network import ClassifierSettings, UNetSettings

PAPER = {
    "imagenet256_uncond": (0.5, "output.2", 9.0),
    "imagenet256_cond": (0.2, "output.2", 9.0),
    "lsun_cat": (0.05, "output.2", 9.0),
    "lsun_horse": (0.01, "output.2", 9.0),
    "imagenet128": (0.1, "output.8", 3.0),
}
"""Table 7: scale, site, blur_sigma."""
OURS = ("fashion_mnist", "fashion_mnist_classifier")
FILES = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def the_environment_is_left_as_it_was(monkeypatch, tmp_path):
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))


def built(file, tmp_path):
    """Build all that a configuration describes; nothing is run, and the network is on the meta device."""
    arguments = ["--config", str(file), "--output", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    parser = training_parser("fit", classifier=trains_classifier(arguments), full=True)
    with torch.device("meta"):
        return prepare_fit(parser, parser.parse(arguments))


def test_there_are_configurations_of_the_paper_s_networks_and_of_ours():
    assert {file.stem for file in FILES} == {*OURS, "my_images", *PAPER}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_is_parsed_and_built_as_it_says(file, tmp_path):
    said, run = yaml.safe_load(file.read_text()), built(file, tmp_path)
    settings = run.module.network.settings
    network = said["model"].get("network") or said["model"]["classifier"]
    if isinstance(network, str):
        assert settings == get_unet_settings(network)[0]
    else:
        for name, value in network.items():
            assert getattr(settings, name) == (tuple(value) if isinstance(value, list) else value), name
    assert f"{type(run.data).__module__}.{type(run.data).__name__}" == said["data"]["class_path"]
    for name, value in said["data"]["init_args"].items():
        assert getattr(run.data, name) == value, name
    assert run.trainer.max_steps == said["trainer"]["max_steps"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_s_network_computes(file, tmp_path):
    network = built(file, tmp_path).module.network
    with torch.device("meta"):
        s = network.settings
        x, timesteps = torch.empty(2, s.in_channels, s.image_size, s.image_size), torch.zeros(2)
        if isinstance(network, Classifier):
            assert network(x, timesteps).shape == (2, s.num_classes)
            return
        out = network(x, timesteps, torch.zeros(2, dtype=torch.long)).out
    assert out.shape == (2, s.in_channels * (1 + s.learn_sigma), s.image_size, s.image_size)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_s_rate_reaches_its_full_height(file, tmp_path):
    run = built(file, tmp_path)
    s, end = run.module.settings.optimizer, run.trainer.max_steps
    assert end == -1 or end > s.warmup_steps + s.decay_steps
    assert max(s.lr_multiplier(step, end) for step in range(0, 10_000, 50)) == 1


@pytest.mark.parametrize("name", PAPER)
def test_a_network_of_the_paper_is_sampled_as_table_7_says(name):
    scale, site, blur_sigma = PAPER[name]
    wanted = SelfAttentionGuidance(scale=scale, site=site, threshold=1.0, blur_sigma=blur_sigma, kernel_size=31)
    for flags in (["--config", name], ["--model", name]):
        request = parse(flags)
        assert request.source.name == name
        assert request.source.network == RELEASED[name].settings
        assert request.guidances["sag"] == wanted
        assert (request.chain.sampler, request.chain.respacing) == ("ddpm", "250")
        guided_by = ("imagenet128_classifier", 0.5) if name == "imagenet128" else (None, 0.0)
        assert (request.guidances["classifier"].checkpoint, request.guidances["classifier"].scale) == guided_by


@pytest.mark.parametrize("name", PAPER)
def test_a_network_of_the_paper_is_trained_as_adm_was(name, tmp_path):
    run = built(FILES[0].with_name(f"{name}.yaml"), tmp_path)
    optimizer, diffusion = run.module.settings.optimizer, run.module.diffusion_settings
    assert (optimizer.learning_rate, optimizer.weight_decay) == (1e-4, 0.0)
    assert (diffusion.noise_schedule, diffusion.num_timesteps) == ("linear", 1000)
    assert run.module.hparams["ema_decay"] == 0.9999
    assert run.data.batch_size * run.trainer.accumulate_grad_batches == 256
    assert run.module.network.settings.dropout == (0.1 if name.startswith("lsun") else 0.0)


def test_the_configuration_of_the_embedded_network_advises_what_its_file_does():
    by_config, by_file = parse(["--config", "fashion_mnist", "--checkpoint", str(DEFAULT_CHECKPOINT)]), parse([])
    assert (by_config.chain, by_config.guidances["sag"], by_config.run) == (
        by_file.chain,
        by_file.guidances["sag"],
        by_file.run,
    )


def test_the_classifier_s_configuration_is_of_the_embedded_network_s_images_and_process_and_fits_the_package():
    network, classifier = (yaml.safe_load((FILES[0].with_name(f"{name}.yaml")).read_text())["model"] for name in OURS)
    assert classifier["diffusion"] == network["diffusion"]
    settings = ClassifierSettings(**classifier["classifier"])
    check_classifier(settings, DiffusionSettings(), UNetSettings(**network["network"]), DiffusionSettings())
    assert sum(tensor.numel() for tensor in meta_state_dict(settings).values()) <= 1.3e6


def test_a_misspelt_name_in_a_configuration_is_found(tmp_path):
    said = yaml.safe_load(FILES[0].read_text())
    said["model"]["network"]["num_chanels"] = 32
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(UserError, match="num_chanels"):
        built(tmp_path / "wrong.yaml", tmp_path)
