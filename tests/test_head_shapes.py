import torch

from benchmarks.head_shapes import AdaptedHead, LastMapHead, LowRank
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


def test_an_adapter_trains_the_low_rank_factors_of_the_last_two_blocks_and_its_convolutions():
    adapted = AdaptedHead(head_settings(NETWORK, map_channels=(64, 32)), NETWORK, rank=2)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and name.startswith("network.")}
    assert all(name.startswith(("network.output_blocks.2", "network.output_blocks.3")) for name in trained)
    assert all(name.endswith((".0.a", ".0.b")) for name in trained)
    assert len(trained) > 8
