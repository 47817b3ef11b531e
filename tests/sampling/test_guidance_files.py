from dataclasses import replace

import pytest

from sagl.models import loading
from sagl.models.zoo import BUNDLED, get_unet_settings
from sagl.sampling.guidance_files import check_guidance_files, guidance_digests, guidance_files
from sagl.settings.guidance import Autoguidance, ClassifierGuidance, PerturbedAttentionGuidance, SelfAttentionGuidance
from sagl.utils.files import sha256
from tests.helpers.errors import refused


@pytest.fixture
def files(tmp_path):
    """A function that writes a file of some bytes and returns its path."""

    def write(name, content="weights"):
        (tmp_path / name).write_text(content)
        return tmp_path / name

    return write


def test_every_weight_file_of_a_method_that_is_on_has_a_digest(files):
    paths = {
        "autoguidance.checkpoint": files("weak.ckpt", "a"),
        "classifier.checkpoint": files("classifier.pt", "b"),
        "sag.dino_checkpoint": files("dino.pth", "c"),
        "sag.direction_head": files("net_sag_head.safetensors", "d"),
    }
    guidances = {
        "autoguidance": Autoguidance(scale=1.0, checkpoint=str(paths["autoguidance.checkpoint"])),
        "classifier": ClassifierGuidance(scale=1.0, checkpoint=str(paths["classifier.checkpoint"])),
        "sag": SelfAttentionGuidance(
            scale=1.0, direction_head="auto", mask="dino", dino_checkpoint=str(paths["sag.dino_checkpoint"])
        ),
        "pag": PerturbedAttentionGuidance(scale=1.0),
    }
    network = paths["sag.direction_head"].with_name("net.safetensors")
    assert guidance_files(guidances, network) == paths
    assert guidance_digests(paths) == {name: sha256(path) for name, path in paths.items()}
    off = {name: replace(guidance, scale=0.0) for name, guidance in guidances.items()}
    assert guidance_files(off, network) == {}


def test_a_file_that_was_replaced_has_another_digest(files):
    paths = {"autoguidance.checkpoint": files("weak.ckpt", "before")}
    before = guidance_digests(paths)
    assert guidance_digests(paths) == before
    path = files("weak.ckpt", "after!")
    assert guidance_digests(paths) == {"autoguidance.checkpoint": sha256(path)} != before


def test_names_of_networks_stand_for_their_files(files, monkeypatch):
    released = files("64x64_classifier.pt")
    monkeypatch.setattr(loading, "download_pretrained", lambda name: released if name == "released" else None)
    for name, path in {"fashion_mnist_classifier": BUNDLED["fashion_mnist_classifier"], "released": released}.items():
        guidances = {"classifier": ClassifierGuidance(scale=1.0, checkpoint=name)}
        assert guidance_files(guidances, None) == {"classifier.checkpoint": path}


def test_weights_of_dino_belong_to_its_mask_alone():
    settings = SelfAttentionGuidance(scale=1.0, dino_checkpoint="missing.pth")
    assert guidance_files({"sag": settings}, None) == {}
    with refused("`sag.dino_checkpoint`", "missing.pth"):
        guidance_files({"sag": replace(settings, mask="dino")}, None)


@pytest.mark.parametrize("name", ["missing.safetensors", "lsun_cats"])
def test_a_missing_file_or_name_is_refused_with_its_parameter(name):
    with refused("`autoguidance.checkpoint`", name):
        guidance_files({"autoguidance": Autoguidance(scale=1.0, checkpoint=name)}, None)


@pytest.mark.parametrize(
    ("guidance", "parameter", "value"),
    [
        (SelfAttentionGuidance(scale=1.0, direction_head="absent.safetensors"), "sag.direction_head", "absent"),
        (SelfAttentionGuidance(scale=1.0, mask="dino", dino_checkpoint="absent.pth"), "sag.dino_checkpoint", "absent"),
        (Autoguidance(scale=1.0, checkpoint="absent.ckpt"), "autoguidance.checkpoint", "absent"),
        (Autoguidance(scale=1.0, checkpoint="lsun_ct"), "autoguidance.checkpoint", "lsun_cat"),
        (Autoguidance(scale=1.0, checkpoint="imagenet64"), "autoguidance.checkpoint", "64x64"),
        (ClassifierGuidance(scale=1.0, checkpoint="imagenet64_classifier"), "classifier.checkpoint", "64x64"),
    ],
)
def test_a_guidance_file_that_cannot_be_used_is_refused_before_a_download(guidance, parameter, value, monkeypatch):
    monkeypatch.setattr(loading, "download", lambda *_, **__: pytest.fail("downloaded"))
    network, diffusion = get_unet_settings("lsun_cat")
    with refused(f"`{parameter}`", value):
        check_guidance_files({guidance.group: guidance}, network, diffusion)
    check_guidance_files({guidance.group: replace(guidance, scale=0.0)}, network, diffusion)


@pytest.mark.parametrize(
    "guidance",
    [
        SelfAttentionGuidance(scale=1.0, direction_head="auto"),
        Autoguidance(scale=1.0, checkpoint="lsun_horse"),
        Autoguidance(scale=1.0, checkpoint="hf:owner/name"),
        ClassifierGuidance(scale=1.0, checkpoint="imagenet256_classifier"),
        ClassifierGuidance(scale=1.0, checkpoint="hf:owner/name"),
    ],
)
def test_names_that_stand_for_files_are_not_looked_up_by_the_check(guidance, monkeypatch):
    monkeypatch.setattr(loading, "download", lambda *_, **__: pytest.fail("downloaded"))
    check_guidance_files({guidance.group: guidance}, *get_unet_settings("lsun_cat"))
