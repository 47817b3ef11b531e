import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sagl.commands._config import parse_sample_config
from sagl.errors import UserError
from sagl.models.adm import Classifier, UNet
from sagl.models.checkpoints import build_network, read_checkpoint
from sagl.models.metadata import read_metadata, settings_from_metadata
from sagl.models.zoo import (
    BUNDLED,
    DEFAULT_CHECKPOINT,
    RELEASED,
    get_entry,
    get_settings,
    get_unet_settings,
    name_from_filename,
)
from sagl.sampling.pipeline import build_pipeline, make_labels
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import ClassifierSettings, UNetSettings
from tests.helpers.reference import KEY_LISTS
from tests.helpers.tiny import network_file, write_tiny

CONFIG = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"

KEY_LIST_OF = {name: name for name in ("imagenet64", "imagenet128", "imagenet256_cond", "imagenet256_uncond")}
KEY_LIST_OF |= {"imagenet512": "imagenet512"} | {
    f"imagenet{n}_classifier": f"classifier{n}" for n in (64, 128, 256, 512)
}
KEY_LIST_OF |= {f"lsun_{kind}": "lsun_cat" for kind in ("bedroom", "cat", "horse", "horse_nodropout")}
"""Names and shapes of each released file; those of the LSUN models are alike."""
UNETS = sorted(name for name in RELEASED if not name.endswith("classifier"))
CLASSIFIERS = sorted(set(RELEASED) - set(UNETS))


def test_a_file_says_what_its_network_is(tmp_path):
    file = network_file(recommended={"respacing": "5"})
    about = read_metadata(write_tiny(tmp_path / "a.safetensors", recommended={"respacing": "5"}))
    assert set(about) == {"network", "diffusion", "recommended"}
    assert about["recommended"] == {"respacing": "5"}
    assert about["diffusion"] == asdict(file.diffusion)
    assert about["network"]["channel_mult"] == [1]


def test_files_that_say_nothing_are_described_by_nothing(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "silent.safetensors")
    torch.save({}, tmp_path / "last.ckpt")
    for name in ("silent.safetensors", "last.ckpt", "absent.safetensors"):
        assert read_metadata(tmp_path / name) == {}


@pytest.mark.parametrize("recommended", [[1], "abc", 3])
def test_a_file_that_recommends_no_settings_is_refused(recommended, tmp_path):
    about = {"sagl": json.dumps({"recommended": recommended})}
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.safetensors", metadata=about)
    with pytest.raises(UserError, match="`recommended` must be a mapping of sampling settings"):
        read_metadata(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("network", "num_res_blocks", 1.5),
        ("network", "num_classes", 2.5),
        ("network", "num_heads", 2.0),
        ("diffusion", "num_timesteps", 99.5),
    ],
)
def test_numbers_in_a_file_that_must_be_whole_are_refused(part, name, value):
    about = {"network": asdict(network_file().model_settings), "diffusion": asdict(DiffusionSettings())}
    about[part][name] = value
    with pytest.raises(UserError, match=f"`{name}` must be an integer, got {value}"):
        settings_from_metadata(about, Path("a.safetensors"))


@pytest.mark.parametrize("change", [{"channel_mult": ["wide"]}, {"channel_mult": [1e308, 1e308]}, {"depth": 3}])
def test_settings_in_a_file_that_are_no_settings_are_refused(change):
    about = {"network": asdict(network_file().model_settings) | change, "diffusion": {}}
    with pytest.raises(UserError, match=r"`checkpoint` .*a\.safetensors"):
        settings_from_metadata(about, Path("a.safetensors"))


def test_the_embedded_network_is_the_one_that_the_configuration_trains():
    trained = yaml.safe_load(CONFIG.read_text())["model"]
    file = read_checkpoint(DEFAULT_CHECKPOINT)
    assert file.model_settings == UNetSettings(**trained["network"])
    assert {name: asdict(file.diffusion)[name] for name in trained["diffusion"]} == trained["diffusion"]


def test_the_embedded_network_s_advice_can_be_followed():
    request, file = parse_sample_config([]), read_checkpoint(DEFAULT_CHECKPOINT)
    assert request.checkpoint == DEFAULT_CHECKPOINT
    network = build_network(file)
    recipe = build_pipeline(network, file.diffusion, request.sampler, request.guidances)
    start, end = (round(fraction * recipe.schedule.num_steps) for fraction in request.guidances["sag"].interval)
    assert recipe.nfe == recipe.schedule.num_steps + (end - start if request.guidances["sag"].scale else 0)
    make_labels(request.run, [0, 1], network)


def test_sag_can_be_asked_of_the_embedded_network_by_its_scale_alone():
    request, file = parse_sample_config(["--sag.scale", "0.05"]), read_checkpoint(DEFAULT_CHECKPOINT)
    assert request.guidances["sag"].scale == 0.05
    assert "sag" in build_pipeline(build_network(file), file.diffusion, request.sampler, request.guidances).guidances


@pytest.mark.parametrize("label", ["null", "balanced", "9"])
def test_the_embedded_network_has_ten_classes_and_a_null_label(label):
    labels = make_labels(
        parse_sample_config(["--labels", label]).run, [9], build_network(read_checkpoint(DEFAULT_CHECKPOINT))
    )
    assert (None if labels is None else labels.tolist()) == (None if label == "null" else [9])


def test_the_embedded_network_is_guided_by_the_embedded_classifier_unless_another_is_named(tmp_path):
    asked = {"--classifier.scale": "1"}, {"--classifier.scale": "1", "--classifier.checkpoint": "mine.safetensors"}, {}
    found = [
        parse_sample_config([word for pair in flags.items() for word in pair]).guidances["classifier"].checkpoint
        for flags in asked
    ]
    assert found == ["fashion_mnist_classifier", "mine.safetensors", None]
    other = write_tiny(tmp_path / "other.safetensors")
    assert (
        parse_sample_config(["--checkpoint", str(other), "--classifier.scale", "1"]).guidances["classifier"].checkpoint
        is None
    )


@pytest.mark.parametrize("name", ["fashion_mnist_classifier", "imagenet64_classifier"])
def test_a_classifier_is_no_network_that_draws(name):
    with pytest.raises(UserError, match=rf"`model` .*{name}.*`classifier.checkpoint`"):
        get_unet_settings(name)


# ---------------------------------------------------------------------------------------- released checkpoints


def test_thirteen_checkpoints_are_known_and_every_key_list_belongs_to_one():
    assert sorted(RELEASED) == sorted(KEY_LIST_OF)
    assert len(RELEASED) == 13
    assert set(KEY_LIST_OF.values()) == set(KEY_LISTS)


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_settings_give_exactly_the_parameters_of_the_released_file(name):
    settings = RELEASED[name].settings
    with torch.device("meta"):
        network = Classifier(settings) if isinstance(settings, ClassifierSettings) else UNet(settings)
    got = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert got == {key: tuple(shape) for key, shape in KEY_LISTS[KEY_LIST_OF[name]].items()}


def test_unets_are_unets_and_classifiers_classifiers():
    assert {type(RELEASED[name].settings) for name in UNETS} == {UNetSettings}
    assert {type(RELEASED[name].settings) for name in CLASSIFIERS} == {ClassifierSettings}


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_heads_are_those_of_the_public_flags_which_no_weights_show(name):
    settings = RELEASED[name].settings
    sides = dict(zip(settings.resolutions, settings.widths, strict=True))
    heads = [settings.num_heads_for(sides[side]) for side in (32, 16, 8)]
    if name in CLASSIFIERS:
        assert [64 * count for count in heads] == [sides[side] for side in (32, 16, 8)]
    else:
        others = [8, 16, 16]
        assert heads == {"imagenet64": [6, 9, 12], "imagenet128": [4, 4, 4]}.get(name, others)


def test_only_the_64_pixel_unet_splits_q_k_v_before_the_heads():
    assert [name for name in RELEASED if RELEASED[name].settings.use_new_attention_order] == ["imagenet64"]


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_the_process_is_the_one_of_training(name):
    expected = DiffusionSettings(noise_schedule="cosine" if "imagenet64" in name else "linear")
    assert RELEASED[name].diffusion == expected
    assert (expected.num_timesteps, expected.variance) == (1000, "learned_range")


def test_dropout_is_that_of_training():
    with_dropout = {name: entry.settings.dropout for name, entry in RELEASED.items() if entry.settings.dropout}
    assert with_dropout == dict.fromkeys(("imagenet64", "lsun_bedroom", "lsun_cat", "lsun_horse"), 0.1)
    plain = replace(RELEASED["lsun_horse"].settings, dropout=0.0)
    assert RELEASED["lsun_horse_nodropout"].settings == plain


def test_labels_are_imagenets_or_none():
    unlabelled = [name for name in UNETS if RELEASED[name].settings.num_classes is None]
    assert unlabelled == ["imagenet256_uncond", *(name for name in UNETS if name.startswith("lsun"))]
    assert {entry.settings.num_classes for name, entry in RELEASED.items() if name not in unlabelled} == {1000}
    assert not any(RELEASED[name].settings.null_label for name in UNETS)


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_file_and_address_are_openais(name):
    entry, size = RELEASED[name], RELEASED[name].settings.image_size
    kind = "classifier" if name in CLASSIFIERS else "diffusion"
    ending = "_uncond" if name == "imagenet256_uncond" else ""
    assert entry.file == (f"{name}.pt" if name.startswith("lsun") else f"{size}x{size}_{kind}{ending}.pt")
    assert entry.url == f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/{entry.file}"
    assert name.startswith("lsun") or name.startswith(f"imagenet{size}")
    assert entry.licence == "MIT"


def test_the_five_networks_of_the_paper_have_a_configuration_of_their_name():
    configs = {name: entry.config for name, entry in RELEASED.items() if entry.config}
    papers = ("imagenet128", "imagenet256_cond", "imagenet256_uncond", "lsun_cat", "lsun_horse")
    assert configs == {name: name for name in papers}


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_a_released_checkpoint_is_known_by_its_file_wherever_it_lies(name):
    assert name_from_filename(Path("elsewhere") / RELEASED[name].file) == name
    assert name_from_filename(Path(f"my_{RELEASED[name].file}")) is None


@pytest.mark.parametrize("name", ["fashion_mnist", "lsun_cat", "imagenet64_classifier"])
def test_settings_are_found_by_name_those_of_classifiers_too(name):
    file = read_checkpoint(DEFAULT_CHECKPOINT) if name == "fashion_mnist" else None
    found = (file.model_settings, file.diffusion) if file else (RELEASED[name].settings, RELEASED[name].diffusion)
    assert get_settings(name) == found
    with pytest.raises(UserError, match="`model` must be one of"):
        get_settings(f"{name}_")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lsun_cats", " Did you mean lsun_cat?"),
        ("lsun_cat.pt", " Did you mean lsun_cat?"),
        ("LSUN_Bedrom", " Did you mean lsun_bedroom?"),
        ("imagenet256", " Did you mean imagenet256_cond or imagenet256_uncond or imagenet256_classifier?"),
        ("resnet50", ""),
        ("", ""),
    ],
)
def test_an_unknown_name_is_refused_with_all_names_and_the_nearest(name, hint):
    with pytest.raises(UserError) as error:
        get_entry(name)
    assert str(error.value) == f"`model` must be one of {', '.join([*BUNDLED, *RELEASED])}; got {name!r}.{hint}"


@pytest.mark.parametrize("module", ["sagl.models.zoo", "sagl.utils.download"])
def test_names_and_downloads_load_no_torch(module):
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=CONFIG.parents[1], check=False).returncode == 0
