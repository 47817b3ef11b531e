from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sagl.commands.sample import parse
from sagl.models.checkpoints import build_network, read_network
from sagl.models.zoo import EMBEDDED, described
from sagl.recipe import labels_of, prepare
from sagl.settings.network import UNetSettings
from tests.tiny import network_file, write_tiny

CONFIG = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"


def test_a_file_says_what_its_network_is(tmp_path):
    file = network_file(recommended={"respacing": "5"})
    about = described(write_tiny(tmp_path / "a.safetensors", recommended={"respacing": "5"}))
    assert set(about) == {"network", "diffusion", "recommended"}
    assert about["recommended"] == {"respacing": "5"}
    assert about["diffusion"] == asdict(file.diffusion)
    assert about["network"]["channel_mult"] == [1]


def test_files_that_say_nothing_are_described_by_nothing(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "silent.safetensors")
    torch.save({}, tmp_path / "last.ckpt")
    for name in ("silent.safetensors", "last.ckpt", "absent.safetensors"):
        assert described(tmp_path / name) == {}


def test_the_embedded_network_is_the_one_that_the_configuration_trains():
    trained = yaml.safe_load(CONFIG.read_text())["model"]
    network = {name: tuple(v) if isinstance(v, list) else v for name, v in trained["network"].items()}
    file = read_network(EMBEDDED)
    assert file.network == UNetSettings(**network)
    assert {name: asdict(file.diffusion)[name] for name in trained["diffusion"]} == trained["diffusion"]


def test_the_embedded_network_s_advice_can_be_followed():
    request, file = parse([]), read_network(EMBEDDED)
    assert request.checkpoint == EMBEDDED
    network = build_network(file)
    recipe = prepare(network, file.diffusion, request.chain, request.sag)
    start, end = (round(fraction * recipe.schedule.num_steps) for fraction in request.sag.interval)
    assert recipe.nfe == recipe.schedule.num_steps + (end - start if request.sag.scale else 0)
    labels_of(request.run, [0, 1], network)


def test_sag_can_be_asked_of_the_embedded_network_by_its_scale_alone():
    request, file = parse(["--sag.scale", "0.05"]), read_network(EMBEDDED)
    assert request.sag.scale == 0.05
    assert "sag" in prepare(build_network(file), file.diffusion, request.chain, request.sag).guidances


@pytest.mark.parametrize("label", ["null", "balanced", "9"])
def test_the_embedded_network_has_ten_classes_and_a_null_label(label):
    labels = labels_of(parse(["--labels", label]).run, [9], build_network(read_network(EMBEDDED)))
    assert (None if labels is None else labels.tolist()) == (None if label == "null" else [9])
