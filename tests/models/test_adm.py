import math

import pytest
import torch

from sagl.errors import UserError
from sagl.models.adm import Classifier, UNet, timestep_embedding
from sagl.settings.network import POOLS, ClassifierSettings, UNetSettings
from sagl.shapes import AttentionSite
from tests.helpers import oracle
from tests.helpers.reference import (
    KEY_LISTS,
    classifier,
    generator,
    network,
    relative_error,
    small_classifier,
    small_unet,
    values,
)
from tests.helpers.tiny import grey_unet

TIMESTEPS = torch.tensor([0, 371, 999])
LABELS = {"adm_a": None, "adm_a8": None, "adm_b": torch.tensor([0, 7, 999])}

RELEASED_UNET = {"image_size": 256, "num_channels": 256, "num_head_channels": 64, "resblock_updown": True}
RELEASED_CLASSIFIER = {"num_channels": 128, "resblock_updown": True}
RELEASED = {
    "imagenet64": UNetSettings(
        **{**RELEASED_UNET, "image_size": 64, "num_channels": 192}, num_res_blocks=3, num_classes=1000
    ),
    "imagenet128": UNetSettings(**{**RELEASED_UNET, "image_size": 128, "num_head_channels": None}, num_classes=1000),
    "imagenet256_cond": UNetSettings(**RELEASED_UNET, num_classes=1000),
    "imagenet256_uncond": UNetSettings(**RELEASED_UNET),
    "imagenet512": UNetSettings(**{**RELEASED_UNET, "image_size": 512}, num_classes=1000),
    "lsun_cat": UNetSettings(**RELEASED_UNET),
    "classifier64": ClassifierSettings(image_size=64, num_res_blocks=4, **RELEASED_CLASSIFIER),
    "classifier128": ClassifierSettings(image_size=128, **RELEASED_CLASSIFIER),
    "classifier256": ClassifierSettings(image_size=256, **RELEASED_CLASSIFIER),
    "classifier512": ClassifierSettings(image_size=512, **RELEASED_CLASSIFIER),
}
"""Flags of the released checkpoints, by the names of the key lists."""

VARIANTS = {
    "grey": {"in_channels": 1},
    "six_channels": {"in_channels": 6},
    "fixed_variance": {"learn_sigma": False},
    "labels": {"num_classes": 7},
    "labels_and_a_null_label": {"num_classes": 7, "null_label": True},
    "other_heads_on_the_way_up": {"num_heads": 2, "num_heads_upsample": 8},
    "one_head": {"num_heads": 1},
    "channels_a_head": {"num_head_channels": 16, "num_heads_upsample": 2},
    "new_order": {"use_new_attention_order": True, "num_heads": 8},
    "new_order_by_channels": {"use_new_attention_order": True, "num_head_channels": 8},
    "added_timestep": {"use_scale_shift_norm": False},
    "residual_resampling": {"resblock_updown": True},
    "plain": {"use_scale_shift_norm": False, "num_res_blocks": 2},
    "no_attention_but_in_the_middle": {"attention_resolutions": ()},
    "one_level": {"channel_mult": (2,), "attention_resolutions": (16,)},
    "three_levels": {"channel_mult": (1, 3, 2), "attention_resolutions": (4,), "resblock_updown": True},
    "narrowing": {"channel_mult": (3, 1), "num_res_blocks": 2, "resblock_updown": True},
}


def images(batch=2, channels=3, height=16, width=16, seed=0):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def reference_images():
    return torch.randn(3, 3, 32, 32, generator=generator(10))


# ------------------------------------------------------------------------------------------ reference values


@pytest.mark.parametrize("name", ["adm_a", "adm_a8", "adm_b"])
def test_forward_is_the_references(name):
    with torch.no_grad():
        out = network(name)(reference_images(), TIMESTEPS, LABELS[name]).out
    assert relative_error(out, values("forward")[f"{name}.out"]) < 1e-5


@pytest.mark.parametrize("key", [key for key in values("forward") if "attention_received" in key])
def test_attention_received_is_the_references(key):
    name, _, place = key.partition(".")
    kind, _, block = place.removeprefix("attention_received").partition(".")
    site = AttentionSite(block, "sag_release" if kind == "_as_released" else "layer")
    with torch.no_grad():
        received = network(name)(reference_images(), TIMESTEPS, LABELS[name], attention_sites=[site]).attention
    assert list(received) == [site]
    assert relative_error(received[site], values("forward")[key]) < 1e-5


def test_classifiers_logits_are_the_references():
    with torch.no_grad():
        logits = classifier()(reference_images(), TIMESTEPS)
    assert relative_error(logits, values("forward")["classifier_c.logits"]) < 1e-5


def test_classifiers_gradient_is_the_references():
    x = reference_images().requires_grad_()
    chosen = classifier()(x, TIMESTEPS).log_softmax(dim=-1)[range(3), [0, 3, 9]].sum()
    assert relative_error(torch.autograd.grad(chosen, x)[0], values("forward")["classifier_c.grad"]) < 1e-5


def test_settings_are_known_for_all_ten_key_lists():
    assert sorted(RELEASED) == sorted(KEY_LISTS)
    assert len(KEY_LISTS) == 10


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_released_key_list_loads_strictly(name):
    with torch.device("meta"):
        net = (Classifier if name.startswith("classifier") else UNet)(RELEASED[name])
        net.load_state_dict({key: torch.empty(shape) for key, shape in KEY_LISTS[name].items()}, strict=True)


# ------------------------------------------------------------------------------------------- other settings


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_attention_of_other_settings_are_those_of_a_second_derivation(name):
    net = small_unet(**VARIANTS[name])
    s = net.settings
    x, timesteps = images(channels=s.in_channels), torch.tensor([3, 777])
    labels = torch.tensor([6, 2]) if s.num_classes else None
    sites = [AttentionSite(site, heads) for site in net.settings.sites for heads in ("layer", "sag_release")]
    with torch.no_grad():
        got = net(x, timesteps, labels, attention_sites=sites)
        want, maps = oracle.adm(net, x, timesteps, labels)
    assert got.out.shape[1] == s.in_channels * (1 + s.learn_sigma)
    assert relative_error(got.out, want) < 1e-5
    assert set(got.attention) == set(maps) == set(sites)
    for site in sites:
        received = got.attention[site]
        assert received.shape[-1] == net.settings.sites[site.name]
        assert relative_error(received.flatten(2), maps[site].sum(dim=2)) < 1e-5


@pytest.mark.parametrize("width", [32, 33])
def test_timestep_embedding_is_cosines_then_sines(width):
    got = timestep_embedding(torch.tensor([0, 1, 999]), width)
    for row, t in zip(got.tolist(), (0, 1, 999), strict=True):
        angles = [t * 10000 ** (-k / (width // 2)) for k in range(width // 2)]
        want = [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (width % 2)
        assert row == pytest.approx(want, abs=1e-4)


def test_the_way_in_and_out_takes_images_that_are_not_square():
    net = small_unet()
    with torch.no_grad():
        got = net(images(height=16, width=24), torch.tensor([1, 2]), attention_sites=[AttentionSite("middle")])
    assert got.out.shape == (2, 6, 16, 24)
    assert got.attention[AttentionSite("middle")].shape == (2, 4, 8, 12)


def test_a_fresh_network_predicts_zero():
    net = UNet(UNetSettings(image_size=16, num_channels=32, channel_mult=(1, 2), attention_resolutions=(8,)))
    assert float(net(images(), torch.tensor([0, 999])).out.detach().abs().max()) == 0


def test_a_half_precision_network_answers_in_float32():
    with torch.no_grad():
        want = small_unet()(images(), torch.tensor([5, 600])).out
        got = small_unet().bfloat16()(images(), torch.tensor([5, 600])).out
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 0.1


def test_dropout_acts_in_training_alone():
    x, timesteps, net = images(), torch.tensor([5, 600]), small_unet(dropout=0.3)
    with torch.no_grad():
        calm = net(x, timesteps).out
        assert torch.equal(calm, small_unet()(x, timesteps).out)
        assert not torch.equal(calm, net.train()(x, timesteps).out)


# --------------------------------------------------------------------------------------------------- labels


def test_no_labels_is_the_null_label():
    net = small_unet(num_classes=3, null_label=True)
    x, timesteps = images(), torch.tensor([5, 600])
    with torch.no_grad():
        none = net(x, timesteps).out
        assert torch.equal(none, net(x, timesteps, torch.tensor([3, 3])).out)
        assert not torch.equal(none, net(x, timesteps, torch.tensor([0, 2])).out)


def test_no_labels_without_a_null_label_is_refused():
    with pytest.raises(UserError, match="`labels` must be given"):
        small_unet(num_classes=3)(images(), torch.tensor([5, 600]))


def test_an_unconditional_network_does_not_read_labels(unet):
    x, timesteps = images(), torch.tensor([5, 600])
    with torch.no_grad():
        assert torch.equal(unet(x, timesteps).out, unet(x, timesteps, torch.tensor([50, 2])).out)


# ------------------------------------------------------------------------------------------- attention sites


@pytest.mark.parametrize("name", ["adm_a", "adm_b"])
def test_asking_for_attention_at_any_site_changes_no_value(name):
    net, x, labels = network(name), reference_images(), LABELS[name]
    with torch.no_grad():
        plain = net(x, TIMESTEPS, labels)
        assert plain.attention == {}
        for site in net.settings.sites:
            asked = net(x, TIMESTEPS, labels, attention_sites=[AttentionSite(site)])
            torch.testing.assert_close(asked.out, plain.out, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["adm_a", "adm_b"])
def test_every_site_brings_back_a_map_of_its_side_with_mean_one(name):
    net = network(name)
    with torch.no_grad():
        asked = [AttentionSite(site) for site in net.settings.sites]
        attention = net(reference_images(), TIMESTEPS, LABELS[name], attention_sites=asked).attention
    assert list(attention) == asked
    for site, received in attention.items():
        assert received.shape[-2:] == (net.settings.sites[site.name],) * 2
        torch.testing.assert_close(received.mean(dim=(2, 3)), torch.ones(received.shape[:2]), rtol=0, atol=1e-5)


def test_the_same_site_may_be_asked_for_twice_and_under_both_head_splits():
    net, released = small_unet(num_head_channels=8), AttentionSite("output.1", "sag_release")
    with torch.no_grad():
        asked = [AttentionSite("output.1"), released, AttentionSite("output.1")]
        attention = net(images(), torch.tensor([5, 600]), attention_sites=asked).attention
    assert set(attention) == {AttentionSite("output.1"), released}
    assert attention[AttentionSite("output.1")].shape[1] == 8
    assert attention[released].shape[1] == 4


@pytest.mark.parametrize("site", ["input.0", "output.99", "bottom", ""])
def test_a_site_without_attention_is_refused_with_the_sites_that_have_it(site):
    net = small_unet(attention_resolutions=(8,))
    with pytest.raises(UserError) as error:
        net(images(), torch.tensor([5, 600]), attention_sites=[AttentionSite(site)])
    assert "input.3 (8x8), middle (8x8), output.0 (8x8), output.1 (8x8);" in str(error.value)
    assert repr(site) in str(error.value)


# ---------------------------------------------------------------------------------- training and classifiers


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_gives_the_same_gradients(dropout):
    x, found = images(), []
    for use_checkpoint in (False, True):
        net = small_unet(use_checkpoint=use_checkpoint, dropout=dropout).train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net(x, torch.tensor([5, 600])).out.square().mean().backward()
        found.append([p.grad for p in net.parameters()])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_activation_checkpointing_runs_blocks_a_second_time():
    calls, net = [], small_unet(use_checkpoint=True)
    net.middle_block[1].norm.register_forward_hook(lambda *_: calls.append(1))
    net(images(), torch.tensor([5, 600])).out.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("pool", POOLS)
def test_every_pooling_gives_a_logit_for_each_class_and_a_gradient(pool):
    net, x = small_classifier(pool=pool), images().requires_grad_()
    logits = net(x, torch.tensor([5, 600]))
    assert logits.shape == (2, 5)
    gradient = torch.autograd.grad(logits[0, 1], x)[0]
    assert float(gradient[0].abs().max()) > 0
    assert float(gradient[1].abs().max()) == 0


@pytest.mark.parametrize("pool", ["spatial", "spatial_v2"])
def test_spatial_poolings_read_the_mean_features_of_every_block(pool):
    net, x, timesteps = small_classifier(pool=pool), images(), torch.tensor([5, 600])
    seen = []
    for stage in (*net.input_blocks, net.middle_block):
        stage.register_forward_hook(lambda _, __, out: seen.append(out[0].mean(dim=(2, 3))))
    with torch.no_grad():
        logits = net(x, timesteps)
        features = torch.cat(seen, dim=1)
        hidden = net.out[0](features)
        if pool == "spatial_v2":
            hidden = torch.nn.functional.group_norm(hidden, 32, net.out[1].weight, net.out[1].bias)
        want = net.out[-1](hidden.relu() if pool == "spatial" else torch.nn.functional.silu(hidden))
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)


def test_adaptive_pooling_is_a_linear_map_of_the_mean():
    net = small_classifier(pool="adaptive")
    with torch.no_grad():
        h = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))
        normed = torch.nn.functional.group_norm(h, 32, net.out[0].weight, net.out[0].bias)
        mean = torch.nn.functional.silu(normed).mean(dim=(2, 3))
        want = mean @ net.out[3].weight[:, :, 0, 0].T + net.out[3].bias
        torch.testing.assert_close(net.out(h), want, rtol=1e-4, atol=1e-5)


def test_attention_pooling_answers_with_the_mean_token():
    net = small_classifier(pool="attention")
    pool = net.out[2]
    h = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([h.mean(dim=(2, 3))[:, :, None], h.flatten(2)], dim=2) + pool.positional_embedding
    with torch.no_grad():
        qkv = torch.nn.functional.conv1d(tokens, pool.qkv_proj.weight, pool.qkv_proj.bias)
        first = oracle.attend(qkv, 2, "new")[0][:, :, :1]
        want = torch.nn.functional.conv1d(first, pool.c_proj.weight, pool.c_proj.bias)[:, :, 0]
        torch.testing.assert_close(pool(h), want, rtol=1e-4, atol=1e-5)


def test_under_autocast_features_keep_their_16_bits_also_with_labels():
    network, seen = grey_unet(), []
    network.input_blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.zeros(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 1]))
    assert seen == [torch.bfloat16]
