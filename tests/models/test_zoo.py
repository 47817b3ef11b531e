from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from sagl.configuration.sample import parse_sample_config
from sagl.errors import UserError
from sagl.models.adm import Classifier, UNet
from sagl.models.checkpoints import build_network, read_checkpoint
from sagl.models.zoo import (
    BUNDLED,
    BUNDLED_REFERENCES,
    DEFAULT_MODEL,
    RELEASED,
    UNET_NAMES,
    default_reference,
    get_entry,
    get_settings,
    get_unet_settings,
    name_from_filename,
)
from sagl.sampling.pipeline import build_pipeline, make_labels
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import ClassifierSettings, UNetSettings
from tests.helpers.networks import write_grey_unet
from tests.helpers.reference_values import KEY_LISTS

CONFIGS = Path(__file__).parents[2] / "configs"

KEY_LIST_OF = {name: name for name in ("imagenet64", "imagenet128", "imagenet256_cond", "imagenet256_uncond")}
KEY_LIST_OF |= {"imagenet512": "imagenet512"} | {
    f"imagenet{n}_classifier": f"classifier{n}" for n in (64, 128, 256, 512)
}
KEY_LIST_OF |= {f"lsun_{kind}": "lsun_cat" for kind in ("bedroom", "cat", "horse", "horse_nodropout")}
"""Names and shapes of each released file; those of the LSUN models are alike."""
UNETS = sorted(name for name in RELEASED if not name.endswith("classifier"))
CLASSIFIERS = sorted(set(RELEASED) - set(UNETS))


@pytest.mark.parametrize("name", ["emoji", "fashion_mnist"])
def test_a_bundled_network_has_the_settings_of_its_config(name):
    trained = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    file = read_checkpoint(BUNDLED[name])
    assert file.model_settings == UNetSettings(**trained["network"])
    assert {name: asdict(file.diffusion)[name] for name in trained["diffusion"]} == trained["diffusion"]


@pytest.mark.parametrize("name", ["emoji", "fashion_mnist"])
def test_the_recommended_settings_of_a_bundled_network_are_valid(name):
    config, file = parse_sample_config(["--model", name]), read_checkpoint(BUNDLED[name])
    assert config.source.checkpoint == BUNDLED[name]
    network = build_network(file)
    pipeline = build_pipeline(network, file.diffusion, config.sampler, config.guidances)
    start, end = (round(fraction * pipeline.schedule.num_steps) for fraction in config.guidances["sag"].interval)
    assert pipeline.nfe == pipeline.schedule.num_steps + (end - start if config.guidances["sag"].scale else 0)
    make_labels(config.samples, [0, 1], network)


def test_the_bundled_classifier_guides_the_bundled_network_by_default(tmp_path):
    for flags, checkpoint in (
        ([], None),
        (["--classifier.scale", "1"], None),
        (["--model", "fashion_mnist"], None),
        (["--model", "fashion_mnist", "--classifier.scale", "1"], "fashion_mnist_classifier"),
        (["--classifier.scale", "1", "--classifier.checkpoint", "my.safetensors"], "my.safetensors"),
        (["--classifier.scale", "1", "--checkpoint", str(write_grey_unet(tmp_path / "other.safetensors"))], None),
    ):
        assert parse_sample_config(flags).guidances["classifier"].checkpoint == checkpoint


def test_emoji_without_labels_are_the_default():
    config = parse_sample_config([])
    assert (config.source.checkpoint, config.samples.labels) == (BUNDLED[DEFAULT_MODEL], "null")
    assert DEFAULT_MODEL == "emoji"


def test_the_reference_of_a_bundled_network_is_its_test_data_and_others_must_be_given():
    assert {name: default_reference(name) for name in UNET_NAMES if name in BUNDLED} == BUNDLED_REFERENCES
    for other in (None, "lsun_cat", "fashion_mnist_classifier"):
        with pytest.raises(UserError, match="`reference`"):
            default_reference(other)


@pytest.mark.parametrize("name", ["fashion_mnist_classifier", "imagenet64_classifier"])
def test_a_classifier_is_not_a_diffusion_model(name):
    with pytest.raises(UserError, match=rf"`model` .*{name}.*`classifier.checkpoint`"):
        get_unet_settings(name)


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_settings_give_the_parameters_of_the_released_file(name):
    settings = RELEASED[name].settings
    with torch.device("meta"):
        network = Classifier(settings) if isinstance(settings, ClassifierSettings) else UNet(settings)
    actual = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert actual == {key: tuple(shape) for key, shape in KEY_LISTS[KEY_LIST_OF[name]].items()}


def test_heads_are_those_of_the_public_flags():
    heads, of_64_channels = {}, {}
    for name, entry in RELEASED.items():
        widths = dict(zip(entry.settings.resolutions, entry.settings.widths, strict=True))
        heads[name] = [entry.settings.num_heads_for(widths[side]) for side in (32, 16, 8)]
        of_64_channels[name] = [widths[side] / 64 for side in (32, 16, 8)]
    expected = {name: [8, 16, 16] for name in UNETS} | {"imagenet64": [6, 9, 12], "imagenet128": [4, 4, 4]}
    assert heads == expected | {name: of_64_channels[name] for name in CLASSIFIERS}


def test_only_the_64_pixel_unet_splits_q_k_v_before_the_heads():
    assert [name for name in RELEASED if RELEASED[name].settings.use_new_attention_order] == ["imagenet64"]


def test_the_diffusion_process_is_that_of_training():
    linear, cosine = (
        DiffusionSettings(noise_schedule=name, num_timesteps=1000, variance="learned_range")
        for name in ("linear", "cosine")
    )
    expected = dict.fromkeys(RELEASED, linear) | dict.fromkeys(("imagenet64", "imagenet64_classifier"), cosine)
    assert {name: entry.diffusion for name, entry in RELEASED.items()} == expected


def test_dropout_is_that_of_training():
    with_dropout = {name: entry.settings.dropout for name, entry in RELEASED.items() if entry.settings.dropout}
    assert with_dropout == dict.fromkeys(("imagenet64", "lsun_bedroom", "lsun_cat", "lsun_horse"), 0.1)
    plain = replace(RELEASED["lsun_horse"].settings, dropout=0.0)
    assert RELEASED["lsun_horse_nodropout"].settings == plain


def test_networks_have_imagenets_classes_or_none():
    unlabelled = [name for name in UNETS if RELEASED[name].settings.num_classes is None]
    assert unlabelled == ["imagenet256_uncond", *(name for name in UNETS if name.startswith("lsun"))]
    assert {entry.settings.num_classes for name, entry in RELEASED.items() if name not in unlabelled} == {1000}
    assert not any(RELEASED[name].settings.null_label for name in UNETS)


def test_file_and_address_are_openais():
    sizes = {name: entry.settings.image_size for name, entry in RELEASED.items()}
    files = {name: f"{size}x{size}_diffusion.pt" for name, size in sizes.items()}
    files |= {name: f"{sizes[name]}x{sizes[name]}_classifier.pt" for name in CLASSIFIERS}
    files |= {name: f"{name}.pt" for name in RELEASED if name.startswith("lsun")}
    files["imagenet256_uncond"] = "256x256_diffusion_uncond.pt"
    assert {name: entry.file for name, entry in RELEASED.items()} == files
    folder = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
    assert {name: entry.url for name, entry in RELEASED.items()} == {n: f"{folder}/{f}" for n, f in files.items()}
    assert [n for n, size in sizes.items() if not n.startswith(("lsun", f"imagenet{size}"))] == []
    assert {entry.licence for entry in RELEASED.values()} == {"MIT"}


def test_the_five_networks_of_the_paper_have_a_configuration_of_their_name():
    configs = {name: entry.config for name, entry in RELEASED.items() if entry.config}
    papers = ("imagenet128", "imagenet256_cond", "imagenet256_uncond", "lsun_cat", "lsun_horse")
    assert configs == {name: name for name in papers}


def test_a_released_checkpoint_is_recognised_by_its_file_name():
    files = {name: entry.file for name, entry in RELEASED.items()}
    assert {name: name_from_filename(Path("elsewhere") / file) for name, file in files.items()} == {n: n for n in files}
    assert {name_from_filename(Path(f"my_{file}")) for file in files.values()} == {None}


def test_settings_are_returned_by_name():
    expected = {n: (RELEASED[n].settings, RELEASED[n].diffusion) for n in ("lsun_cat", "imagenet64_classifier")}
    file = read_checkpoint(BUNDLED["fashion_mnist"])
    expected["fashion_mnist"] = (file.model_settings, file.diffusion)
    assert {name: get_settings(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("lsun_cats", ["lsun_cat"]),
        ("lsun_cat.pt", ["lsun_cat"]),
        ("LSUN_Bedrom", ["lsun_bedroom"]),
        ("imagenet256", ["imagenet256_cond", "imagenet256_uncond", "imagenet256_classifier"]),
        ("resnet50", []),
        ("", []),
    ],
)
def test_an_unknown_name_is_refused_with_all_names_and_similar_ones(name, similar):
    with pytest.raises(UserError) as error:
        get_entry(name)
    message, _, hint = str(error.value).partition(f"got {name!r}.")
    assert "`model`" in message
    assert all(known in message for known in [*BUNDLED, *RELEASED])
    assert [known for known in hint.strip(" ?").removeprefix("Did you mean ").split(" or ") if known] == similar


def test_a_bundled_network_has_no_entry_to_download():
    with pytest.raises(UserError, match=r"`model`.*emoji"):
        get_entry("emoji")
