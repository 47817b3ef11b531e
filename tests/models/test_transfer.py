import pytest
import torch

from sagl.errors import UserError
from sagl.models.transfer import LABELS, freeze, load_pretrained_weights
from tests.helpers.tiny import grey_classifier, grey_unet


def out_of(network, labels):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return network(x, torch.tensor([3.0, 500.0]), labels).out


def test_the_same_network_takes_the_weights_as_they_are():
    old, new = grey_unet(), grey_unet()
    state = {name: tensor + 1 for name, tensor in old.state_dict().items()}
    assert load_pretrained_weights(new, state) is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in new.state_dict().items())


def test_labels_on_an_unconditional_network_change_nothing_at_first():
    old, new = grey_unet(num_classes=None, null_label=False), grey_unet(num_classes=7)
    said = load_pretrained_weights(new, old.state_dict())
    assert said == "The checkpoint has no labels: the network's 8 begin as zeros."
    torch.testing.assert_close(out_of(new, torch.tensor([0, 6])), out_of(old, None), rtol=0, atol=0)


def test_other_classes_begin_as_the_mean_of_the_old():
    old, new = grey_unet(num_classes=3), grey_unet(num_classes=5)
    said = load_pretrained_weights(new, old.state_dict())
    assert "has 4 labels: the network's 6 are new" in said
    torch.testing.assert_close(new.state_dict()[LABELS][4], old.state_dict()[LABELS].mean(dim=0))


@pytest.mark.parametrize("had_null", [False, True])
def test_a_null_label_that_is_new_or_gone_leaves_the_classes_as_they_were(had_null):
    old, new = grey_unet(num_classes=3, null_label=had_null), grey_unet(num_classes=3, null_label=not had_null)
    said = load_pretrained_weights(new, old.state_dict())
    assert said.startswith(
        "The checkpoint's 3 classes are kept; the null label " + ("is dropped" if had_null else "begins")
    )
    torch.testing.assert_close(out_of(new, torch.tensor([0, 2])), out_of(old, torch.tensor([0, 2])), rtol=0, atol=0)
    if not had_null:
        torch.testing.assert_close(new.state_dict()[LABELS][3], old.state_dict()[LABELS].mean(dim=0))


def test_labels_that_the_network_has_no_use_for_are_dropped_aloud():
    old, new = grey_unet(num_classes=3), grey_unet(num_classes=None, null_label=False)
    assert "dropped" in load_pretrained_weights(new, old.state_dict())
    assert torch.equal(new.state_dict()["out.2.weight"], old.state_dict()["out.2.weight"])


def test_weights_that_differ_elsewhere_are_refused():
    with pytest.raises(UserError, match="classes alone"):
        load_pretrained_weights(grey_unet(), grey_unet(num_channels=64).state_dict())


def test_frozen_parameters_are_those_that_match():
    network = grey_unet().requires_grad_(True)
    freeze(network, ["input_blocks.*", "time_embed.0.bias"])
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, _ in network.named_parameters() if n.startswith("input_blocks.")} | {"time_embed.0.bias"}


@pytest.mark.parametrize(
    ("patterns", "said"), [(["inputs.*"], "'inputs.\\*' matches none"), (["*"], "something to train")]
)
def test_what_freezes_nothing_or_all_is_refused(patterns, said):
    with pytest.raises(UserError, match=said):
        freeze(grey_unet(), patterns)


def of_other_weights(network):
    return {name: tensor + 1 for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_a_classifier_of_other_classes_keeps_its_own_last_layer_alone(pool):
    network = grey_classifier(num_classes=5, pool=pool)
    state = of_other_weights(grey_classifier(pool=pool))
    first = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert load_pretrained_weights(network, state) == (
        "The checkpoint has 3 classes: the classifier's 5 are new, and its last layer begins anew."
    )
    now = network.state_dict()
    own = [name for name in now if torch.equal(now[name], first[name])]
    assert len(own) == 2
    assert all(len(now[name]) == 5 for name in own)
    assert all(torch.equal(now[name], state[name]) for name in now if name not in own)


def test_the_same_classifier_takes_the_weights_as_they_are():
    network = grey_classifier()
    state = of_other_weights(network)
    assert load_pretrained_weights(network, state) is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_a_classifier_takes_no_network_that_draws_nor_another_width():
    for state in (grey_unet().state_dict(), grey_classifier(num_channels=64, num_classes=5).state_dict()):
        with pytest.raises(UserError, match="classes alone"):
            load_pretrained_weights(grey_classifier(), state)
