import json

import pytest
import torch
from PIL import Image

from sagl.analysis import overlap
from sagl.analysis.registry import ANALYSES
from sagl.utils.files import sha256
from tests.helpers.commands import exit_code, refusal
from tests.helpers.networks import write_grey_unet

FLAGS = ("--num_samples", "2", "--respacing", "3", "--sampler", "ddim", "--sag.site", "output.1", "--progress", "off")


@pytest.mark.parametrize("analysis", ANALYSES)
def test_every_study_writes_a_figure_and_its_numbers_with_their_settings(analysis, tmp_path):
    levels = {"channel_mult": (1, 2), "attention_resolutions": (8, 4)}
    network, output = write_grey_unet(tmp_path / "n.safetensors", **levels), tmp_path / "figures"
    assert exit_code("analyze", analysis, "--checkpoint", network, "--output", output, "--seed", "5", *FLAGS) == 0
    assert {path.name for path in output.iterdir()} == {f"{analysis}.png", f"{analysis}.json"}
    with Image.open(output / f"{analysis}.png") as image:
        assert len(set(image.convert("L").tobytes())) > 20
    content = json.loads((output / f"{analysis}.json").read_text())
    assert content["settings"]["seed"] == 5
    assert content["settings"]["weights_sha256"] == sha256(network)
    assert content["settings"]["command"].startswith(f"sagl analyze {analysis} ")
    assert content["numbers"]


@pytest.mark.parametrize(
    "mask", [("global",), ("random", "--sag.site", "middle,output.1"), ("attention", "--sag.soft", "true")]
)
def test_a_step_is_drawn_with_the_mask_of_its_settings(mask, tmp_path):
    network = write_grey_unet(tmp_path / "n.safetensors")
    assert exit_code("analyze", "step", "--checkpoint", network, "--output", tmp_path, *FLAGS, "--sag.mask", *mask) == 0
    fraction = json.loads((tmp_path / "step.json").read_text())["numbers"]["masked_fraction"]
    assert fraction == 1 if mask == ("global",) else 0 < fraction < 1


@pytest.mark.slow
@pytest.mark.parametrize("analysis", ["late", "cost", "blur"])
def test_pictures_and_costs_of_the_bundled_direction_head(analysis, tmp_path):
    flags = ("--sag.direction_head", "auto", "--num_samples", "1", "--sampler", "ddim", "--respacing", "ddim2")
    assert exit_code("analyze", analysis, "--model", "emoji", "--output", tmp_path, *flags, "--progress", "off") == 0
    numbers = json.loads((tmp_path / f"{analysis}.json").read_text())["numbers"]
    assert numbers.get("mean_absolute_difference", 1) > 0


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("nothing",), ("analysis", "nothing", "frequency")),
        (("overlap", "--object_masks", "absent"), ("--object_masks", "absent")),
        (("attention", "--trainer.devices", "2"), ("--trainer.devices", "2")),
        (("step", "--sag.site", "input.0"), ("--sag.site", "input.0")),
        (("frequency",), ("frequency", "8x8")),
    ],
)
def test_what_cannot_be_analyzed_is_refused_in_one_line(flags, names, tmp_path, capsys):
    network = write_grey_unet(tmp_path / "n.safetensors")
    analysis, *rest = flags
    command = ["analyze", analysis, "--checkpoint", network, "--output", tmp_path / "o", *FLAGS, *rest]
    refusal(capsys, tmp_path, *command, names=names)


def test_objects_of_mask_rcnn_are_the_union_of_the_certain_ones(monkeypatch):
    certain, doubtful = torch.zeros(2, 1, 8, 8)
    certain[0, :2], doubtful[0, 4:] = 0.9, 0.9

    class Network(torch.nn.Module):
        def forward(self, images):
            assert images[0].shape == (3, 8, 8)
            return [{"masks": torch.stack([certain, doubtful]), "scores": torch.tensor([0.8, 0.2])}]

    monkeypatch.setattr("torchvision.models.detection.maskrcnn_resnet50_fpn", lambda weights: Network())
    mask = overlap.mask_rcnn(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert mask.shape == (2, 1, 8, 8)
    assert torch.equal(mask[0], certain > 0)
