import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from sagl.errors import UserError
from sagl.models.adm import UNet
from sagl.models.layers import timestep_embedding
from sagl.settings.network import UNetSettings
from sagl.shapes import AttentionSite
from tests.helpers import formulas
from tests.helpers.networks import grey_unet, small_classifier, small_unet
from tests.helpers.reference_values import classifier, generator, network, relative_error, values

TIMESTEPS = torch.tensor([0, 371, 999])
LABELS = {"adm_a": None, "adm_a8": None, "adm_b": torch.tensor([0, 7, 999])}

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


@pytest.fixture(params=[False, True], ids=["plain", "optimized"])
def optimized(request):
    """Whether the network's layers are replaced by kernels for CPUs."""
    return request.param


@pytest.mark.parametrize("name", ["adm_a", "adm_a8", "adm_b"])
def test_forward_equals_the_reference_values(name, optimized):
    with torch.no_grad():
        out = network(name, optimized)(reference_images(), TIMESTEPS, LABELS[name]).out
    assert relative_error(out, values("forward")[f"{name}.out"]) < 1e-5


@pytest.mark.parametrize("key", [key for key in values("forward") if "attention_received" in key])
def test_attention_received_equals_the_reference_values(key, optimized):
    name, _, site_key = key.partition(".")
    layout, _, block = site_key.removeprefix("attention_received").partition(".")
    site = AttentionSite(block, "sag_release" if layout == "_as_released" else "layer")
    net = network(name, optimized)
    with torch.no_grad():
        maps = net(reference_images(), TIMESTEPS, LABELS[name], attention_sites=[site]).attention
    assert list(maps) == [site]
    assert relative_error(maps[site], values("forward")[key]) < 1e-5


def test_logits_and_gradient_of_the_classifier_equal_the_reference_values(optimized):
    x = reference_images().requires_grad_()
    logits = classifier(optimized)(x, TIMESTEPS)
    assert relative_error(logits, values("forward")["classifier_c.logits"]) < 1e-5
    log_prob = logits.log_softmax(dim=-1)[range(3), [0, 3, 9]].sum()
    assert relative_error(torch.autograd.grad(log_prob, x)[0], values("forward")["classifier_c.grad"]) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_attention_of_other_settings_are_those_of_an_independent_implementation(name):
    net = small_unet(**VARIANTS[name])
    s = net.settings
    x, timesteps = images(channels=s.in_channels), torch.tensor([3, 777])
    labels = torch.tensor([6, 2]) if s.num_classes else None
    sites = [AttentionSite(site, heads) for site in net.settings.sites for heads in ("layer", "sag_release")] * 2
    with torch.no_grad():
        output = net(x, timesteps, labels, attention_sites=sites)
        expected, maps = formulas.adm(net, x, timesteps, labels)
    assert output.out.shape[1] == s.in_channels * (1 + s.learn_sigma)
    assert relative_error(output.out, expected) < 1e-5
    assert list(dict.fromkeys(site for site, _ in maps)) == list(net.settings.sites)
    assert set(output.attention) == set(maps) == set(sites)
    for site in sites:
        actual = output.attention[site]
        assert actual.shape[-1] == net.settings.sites[site.name]
        assert relative_error(actual.flatten(2), maps[site].sum(dim=2)) < 1e-5


@pytest.mark.parametrize("width", [32, 33])
def test_timestep_embedding_is_cosines_then_sines(width):
    embedding = timestep_embedding(torch.tensor([0, 1, 999]), width)
    for row, t in zip(embedding.tolist(), (0, 1, 999), strict=True):
        angles = [t * 10000 ** (-k / (width // 2)) for k in range(width // 2)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (width % 2)
        assert row == pytest.approx(expected, abs=1e-4)


def test_images_need_not_be_square():
    net = small_unet()
    with torch.no_grad():
        output = net(images(height=16, width=24), torch.tensor([1, 2]), attention_sites=[AttentionSite("middle")])
    assert output.out.shape == (2, 6, 16, 24)
    assert output.attention[AttentionSite("middle")].shape == (2, 4, 8, 12)


def test_a_fresh_network_predicts_zero():
    net = UNet(UNetSettings(image_size=16, num_channels=32, channel_mult=(1, 2), attention_resolutions=(8,)))
    assert float(net(images(), torch.tensor([0, 999])).out.detach().abs().max()) == 0


def test_a_half_precision_network_returns_float32():
    with torch.no_grad():
        expected = small_unet()(images(), torch.tensor([5, 600])).out
        actual = small_unet().bfloat16()(images(), torch.tensor([5, 600])).out
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) < 0.1


def test_dropout_acts_only_in_training():
    x, timesteps, net = images(), torch.tensor([5, 600]), small_unet(dropout=0.3)
    with torch.no_grad():
        without = net(x, timesteps).out
        assert torch.equal(without, small_unet()(x, timesteps).out)
        assert not torch.equal(without, net.train()(x, timesteps).out)


def test_no_labels_is_the_null_label():
    net = small_unet(num_classes=3, null_label=True)
    x, timesteps = images(), torch.tensor([5, 600])
    with torch.no_grad():
        none = net(x, timesteps).out
        assert torch.equal(none, net(x, timesteps, torch.tensor([3, 3])).out)
        assert not torch.equal(none, net(x, timesteps, torch.tensor([0, 2])).out)


def test_no_labels_without_a_null_label_is_refused():
    with pytest.raises(UserError, match="`labels`"):
        small_unet(num_classes=3)(images(), torch.tensor([5, 600]))


def test_an_unconditional_network_ignores_labels(unet):
    x, timesteps = images(), torch.tensor([5, 600])
    with torch.no_grad():
        assert torch.equal(unet(x, timesteps).out, unet(x, timesteps, torch.tensor([50, 2])).out)


def test_requesting_attention_at_any_site_does_not_change_the_output(unet):
    x, timesteps = images(), torch.tensor([5, 600])
    with torch.no_grad():
        plain = unet(x, timesteps)
        assert plain.attention == {}
        for site in unet.settings.sites:
            out = unet(x, timesteps, attention_sites=[AttentionSite(site)]).out
            torch.testing.assert_close(out, plain.out, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", ["output.0", "output.2", "output.3"])
def test_an_evaluation_that_starts_at_a_block_has_the_rest_of_the_network_and_all_its_skip_connections(unet, start):
    x, other, timesteps = images(), images(seed=1), torch.tensor([5, 600])
    with torch.no_grad():
        whole = unet(x, timesteps, block_inputs=[start])
        assert torch.equal(unet(x, timesteps, start=(start, whole.block_inputs[start])).out, whole.out)
        replaced = unet(other, timesteps, start=(start, whole.block_inputs[start])).out

        def replace_input(_, args):  # the skip connection follows the block's own input
            own = whole.block_inputs[start]
            return torch.cat([own, args[0][:, own.shape[1] :]], dim=1), *args[1:]

        block = unet.output_blocks[int(start.removeprefix("output."))]
        with block.register_forward_pre_hook(replace_input):
            assert torch.equal(replaced, unet(other, timesteps).out)
        assert not torch.equal(replaced, whole.out)


@pytest.mark.parametrize("num_res_blocks", [1, 2])
@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_the_coarse_blocks_are_the_last_of_each_resolution_below_that_of_the_image(num_res_blocks, num_levels):
    levels = {"channel_mult": (1, 2, 3)[:num_levels], "attention_resolutions": (8,)}
    network = grey_unet(num_res_blocks=num_res_blocks, **levels)
    s = network.settings
    with torch.no_grad():
        x, timesteps = torch.zeros(2, 1, 8, 8), torch.tensor([5, 600])
        inputs = network(x, timesteps, block_inputs=s.output_blocks).block_inputs
    sides = {name: inputs[name].shape[-1] for name in s.output_blocks}
    last = [a for a, b in itertools.pairwise(s.output_blocks) if sides[b] == 2 * sides[a]]
    assert s.coarse_blocks == last
    assert [inputs[name].shape[1] for name in last] == list(s.map_channels[:-1])
    assert [sides[name] for name in last] == list(s.resolutions[:0:-1])


def test_a_site_without_attention_is_refused():
    with pytest.raises(UserError, match="`site`"):
        small_unet()(images(), torch.tensor([5, 600]), attention_sites=[AttentionSite("output.99")])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_computes_blocks_twice_and_gives_the_same_gradients(dropout):
    x, gradients, calls = images(), [], []
    for use_checkpoint in (False, True):
        net = small_unet(use_checkpoint=use_checkpoint, dropout=dropout).train()
        net.middle_block[1].norm.register_forward_hook(lambda *_: calls.append(1))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net(x, torch.tensor([5, 600])).out.square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert len(calls) == 1 + 2
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_every_pooling_gives_a_logit_for_each_class_and_a_gradient(pool):
    net, x = small_classifier(pool=pool), images().requires_grad_()
    logits = net(x, torch.tensor([5, 600]))
    assert logits.shape == (2, 5)
    gradient = torch.autograd.grad(logits[0, 1], x)[0]
    assert float(gradient[0].abs().max()) > 0
    assert float(gradient[1].abs().max()) == 0


@pytest.mark.parametrize("pool", ["spatial", "spatial_v2"])
def test_spatial_poolings_use_the_mean_features_of_every_block(pool):
    net, x, timesteps, means = small_classifier(pool=pool), images(), torch.tensor([5, 600]), []
    for block in (*net.input_blocks, net.middle_block):
        block.register_forward_hook(lambda _, __, out: means.append(out[0].mean(dim=(2, 3))))
    with torch.no_grad():
        logits = net(x, timesteps)
        hidden = net.out[0](torch.cat(means, dim=1))
        if pool == "spatial_v2":
            hidden = F.silu(F.group_norm(hidden, 32, net.out[1].weight, net.out[1].bias))
        expected = net.out[-1](hidden.relu() if pool == "spatial" else hidden)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_adaptive_pooling_is_a_linear_map_of_the_mean():
    net, h = small_classifier(pool="adaptive"), images(2, 64, 8, 8)
    with torch.no_grad():
        mean = F.silu(F.group_norm(h, 32, net.out[0].weight, net.out[0].bias)).mean(dim=(2, 3))
        expected = mean @ net.out[3].weight[:, :, 0, 0].T + net.out[3].bias
        torch.testing.assert_close(net.out(h), expected, rtol=1e-4, atol=1e-5)


def test_attention_pooling_returns_the_output_of_the_mean_token():
    pool, h = small_classifier(pool="attention").out[2], images(2, 64, 8, 8)
    tokens = torch.cat([h.mean(dim=(2, 3))[:, :, None], h.flatten(2)], dim=2) + pool.positional_embedding
    with torch.no_grad():
        qkv = F.conv1d(tokens, pool.qkv_proj.weight, pool.qkv_proj.bias)
        first = formulas.attend(qkv, 2, "new")[0][:, :, :1]
        expected = F.conv1d(first, pool.c_proj.weight, pool.c_proj.bias)[:, :, 0]
        torch.testing.assert_close(pool(h), expected, rtol=1e-4, atol=1e-5)


def test_features_are_16_bits_under_autocast():
    network, dtypes = grey_unet(), []
    network.input_blocks[1].register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.zeros(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 1]))
    assert dtypes == [torch.bfloat16]
