import torch

from benchmarks.head_shapes import AdaptedHead, LastMapHead, LowRank, operations
from sagl.models.direction_head import Pairs
from sagl.models.flops import flops_per_evaluation
from tests.helpers.heads import head_settings
from tests.helpers.networks import draw_weights, grey_unet

NETWORK = grey_unet(channel_mult=(1, 2), attention_resolutions=(8, 4))
X, TIMESTEPS = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])


@torch.no_grad()
def test_an_adapter_without_changes_is_a_head_of_the_network_s_own_last_map():
    settings = head_settings(NETWORK, map_channels=(64, 32))
    own = draw_weights(LastMapHead(settings), 3)
    adapted = AdaptedHead(settings, NETWORK, rank=2)
    adapted.load_state_dict(own.state_dict(), strict=False)
    output = NETWORK(X[:, :1], TIMESTEPS, features=True, block_inputs=["output.2"])
    expected = own(X, [output.features], TIMESTEPS)
    torch.testing.assert_close(adapted(X, [output.block_inputs["output.2"]], TIMESTEPS), expected)
    for module in adapted.network.output_blocks[-1].modules():
        if isinstance(module, LowRank):
            module.b.fill_(0.1)
    assert not torch.allclose(adapted(X, [output.block_inputs["output.2"]], TIMESTEPS), expected)


def test_an_adapter_trains_the_low_rank_factors_of_the_last_two_blocks_and_its_head():
    adapted = AdaptedHead(head_settings(NETWORK, map_channels=(64, 32)), NETWORK, rank=2)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {"convs.0.conv.weight", "out.weight"} < trained
    assert "levels" not in trained
    trained = {name for name in trained if name.startswith("network.")}
    assert all(name.startswith(("network.output_blocks.2", "network.output_blocks.3")) for name in trained)
    assert all(name.endswith((".0.a", ".0.b")) for name in trained)
    assert len(trained) > 8


def test_operations_are_those_of_the_head_and_of_the_adapted_blocks_alone():
    settings = head_settings(NETWORK, map_channels=(64, 32))
    features, block_input = torch.zeros(2, 32, 8, 8), torch.zeros(2, 64, 8, 8)
    own, adapted = LastMapHead(settings), AdaptedHead(settings, NETWORK, rank=2)
    direction = torch.zeros(2, 1, 8, 8)
    blocks = operations(adapted, Pairs(X, (block_input,), TIMESTEPS, direction)) - operations(
        own, Pairs(X, (features,), TIMESTEPS, direction)
    )
    whole = flops_per_evaluation(NETWORK.settings, "output.2")
    assert 0.5 * whole < blocks < whole
