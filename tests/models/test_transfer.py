from dataclasses import replace

import pytest
import torch

from sagl.errors import UserError
from sagl.models.transfer import LABELS, freeze, load_initial_weights, load_pretrained_weights
from sagl.models.zoo import RELEASED
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.errors import refused
from tests.helpers.networks import grey_classifier, grey_unet, write_grey_unet


def output(network, labels):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return network(x, torch.tensor([3.0, 500.0]), labels).out


def other_weights(network):
    return {name: tensor + 1 for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("make", [grey_unet, grey_classifier])
def test_the_same_network_gets_the_weights_unchanged(make):
    network = make()
    state_dict = other_weights(network)
    assert load_pretrained_weights(network, state_dict) is None
    assert all(torch.equal(tensor, state_dict[name]) for name, tensor in network.state_dict().items())


def test_labels_of_an_unconditional_network_change_nothing_at_first():
    old, new = grey_unet(num_classes=None, null_label=False), grey_unet(num_classes=7)
    assert "8" in load_pretrained_weights(new, old.state_dict())
    torch.testing.assert_close(output(new, torch.tensor([0, 6])), output(old, None), rtol=0, atol=0)


def test_other_classes_start_as_the_mean_of_the_old():
    old, new = grey_unet(num_classes=3), grey_unet(num_classes=5)
    message = load_pretrained_weights(new, old.state_dict(), old.settings)
    assert "3 classes" in message
    embeddings = old.state_dict()[LABELS]
    torch.testing.assert_close(new.state_dict()[LABELS][4], embeddings[:3].mean(dim=0))
    assert torch.equal(new.state_dict()[LABELS][5], embeddings[3])  # the null label


@pytest.mark.parametrize("has_null", [False, True])
def test_the_null_label_does_not_become_one_of_more_classes(has_null):
    old, new = grey_unet(num_classes=3, null_label=True), grey_unet(num_classes=4, null_label=has_null)
    embeddings = old.state_dict()[LABELS]
    message = load_pretrained_weights(new, old.state_dict(), old.settings)
    assert ("3 classes" in message, "null label" in message) == (True, not has_null)
    torch.testing.assert_close(new.state_dict()[LABELS][:4], embeddings[:3].mean(dim=0).expand(4, -1))


def test_labels_of_unknown_origin_are_classes():
    old, new = grey_unet(num_classes=4, null_label=False), grey_unet(num_classes=3, null_label=True)
    assert load_pretrained_weights(new, old.state_dict()) is None
    assert torch.equal(new.state_dict()[LABELS], old.state_dict()[LABELS])


@pytest.mark.parametrize("had_null", [False, True])
def test_adding_or_removing_the_null_label_keeps_the_classes(had_null):
    old, new = grey_unet(num_classes=3, null_label=had_null), grey_unet(num_classes=3, null_label=not had_null)
    assert "3 classes" in load_pretrained_weights(new, old.state_dict(), old.settings)
    torch.testing.assert_close(output(new, torch.tensor([0, 2])), output(old, torch.tensor([0, 2])), rtol=0, atol=0)
    if not had_null:
        torch.testing.assert_close(new.state_dict()[LABELS][3], old.state_dict()[LABELS].mean(dim=0))


def test_labels_are_dropped_with_a_message_if_the_network_is_unconditional():
    old, new = grey_unet(num_classes=3), grey_unet(num_classes=None, null_label=False)
    assert "4 labels" in load_pretrained_weights(new, old.state_dict())
    assert torch.equal(new.state_dict()["out.2.weight"], old.state_dict()["out.2.weight"])


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_a_classifier_of_other_classes_keeps_only_its_own_last_layer(pool):
    network = grey_classifier(num_classes=5, pool=pool)
    state_dict = other_weights(grey_classifier(pool=pool))
    initial = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    message = load_pretrained_weights(network, state_dict)
    assert "3 classes" in message
    loaded = network.state_dict()
    own = [name for name in loaded if torch.equal(loaded[name], initial[name])]
    assert [len(loaded[name]) for name in own] == [5, 5]
    assert all(torch.equal(loaded[name], state_dict[name]) for name in loaded if name not in own)


@pytest.mark.parametrize(
    ("network", "other"),
    [
        (grey_unet, lambda: grey_unet(num_channels=64)),
        (grey_classifier, grey_unet),
        (grey_classifier, lambda: grey_classifier(num_channels=64, num_classes=5)),
    ],
)
def test_weights_that_differ_elsewhere_are_refused(network, other):
    with pytest.raises(UserError, match=r"`checkpoint` .*parameters differ"):
        load_pretrained_weights(network(), other().state_dict())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"use_new_attention_order": True}, "use_new_attention_order"),
        ({"num_heads": 1}, "num_heads"),
        ({"num_head_channels": 16}, "num_head_channels"),
    ],
)
def test_settings_that_no_weight_shows_must_be_those_of_the_file(change, name, tmp_path):
    path = write_grey_unet(tmp_path / "network.safetensors")
    with pytest.raises(UserError, match=rf"`model\.network` must have the .*{name}.* of .*network\.safetensors"):
        load_initial_weights(grey_unet(**change), DiffusionSettings(), str(path))


def test_the_same_heads_may_be_given_by_other_settings(tmp_path):
    path = write_grey_unet(tmp_path / "network.safetensors", num_heads=4)
    assert load_initial_weights(grey_unet(num_heads=4, num_heads_upsample=4), DiffusionSettings(), str(path)) == []


def test_the_file_of_a_released_network_is_known_by_its_name(tmp_path, monkeypatch):
    entry = replace(RELEASED["imagenet64"], settings=grey_unet().settings)
    monkeypatch.setitem(RELEASED, "imagenet64", entry)
    torch.save(grey_unet().state_dict(), tmp_path / entry.file)
    with pytest.raises(UserError, match=r"`model\.network` .*use_new_attention_order"):
        load_initial_weights(grey_unet(use_new_attention_order=True), entry.diffusion, str(tmp_path / entry.file))


def test_another_process_than_that_of_the_weights_is_reported(tmp_path):
    path = write_grey_unet(tmp_path / "network.safetensors")
    assert load_initial_weights(grey_unet(), DiffusionSettings(), str(path)) == []
    (message,) = load_initial_weights(grey_unet(), DiffusionSettings(noise_schedule="cosine"), str(path))
    assert "noise_schedule linear (now cosine)" in message


def test_frozen_parameters_are_those_that_match():
    network = grey_unet().requires_grad_(True)
    freeze(network, ["input_blocks.*", "time_embed.0.bias"])
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, _ in network.named_parameters() if n.startswith("input_blocks.")} | {"time_embed.0.bias"}


@pytest.mark.parametrize("pattern", ["inputs.*", "*"])
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(pattern):
    with refused("`freeze`", repr(pattern)):
        freeze(grey_unet().requires_grad_(True), [pattern])
