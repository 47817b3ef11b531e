import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sagl.models.checkpoints import build_head, cast_weights, read_checkpoint
from sagl.models.direction_head import NUM_LEVELS, DirectionHead, is_same_network, network_rms
from sagl.models.flops import flops_per_evaluation
from sagl.models.zoo import get_unet_settings
from sagl.settings.direction_head import DirectionHeadOptions
from tests.helpers.heads import head_settings, random_head, write_head
from tests.helpers.networks import grey_unet

GENERATOR = torch.Generator().manual_seed(0)
SHAPES = [(96, 2, 2), (64, 4, 4), (32, 8, 8)]
IMAGES, *MAPS = (torch.randn(3, *shape, generator=GENERATOR) for shape in [(5, 8, 8), *SHAPES])
TIMESTEPS = torch.tensor([0, 400, 999])


def three_level_head():
    """A head of a network with three resolutions, which does not predict zero."""
    return random_head(map_channels=(96, 64, 32))


def test_a_new_head_predicts_zero():
    assert not DirectionHead(head_settings(map_channels=(96, 64, 32)))(IMAGES, MAPS, TIMESTEPS).any()
    assert three_level_head()(IMAGES, MAPS, TIMESTEPS).shape == (3, 1, 8, 8)
    assert random_head()(IMAGES, MAPS[-1:], TIMESTEPS).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("changed", range(5))
def test_the_prediction_of_a_sample_depends_on_each_of_its_inputs_and_on_no_other_sample(changed):
    head = three_level_head()
    images, *maps, timesteps = (
        torch.cat([value[:2], value[2:] // 2]) if k == changed else value
        for k, value in enumerate([IMAGES, *MAPS, TIMESTEPS])
    )
    before, after = head(IMAGES, MAPS, TIMESTEPS), head(images, maps, timesteps)
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2], after[2])


def test_a_head_takes_at_most_three_hundredths_of_the_operations_of_the_bundled_network():
    network, _ = get_unet_settings("emoji")
    options = DirectionHeadOptions()
    changes = {"in_channels": network.in_channels, "map_channels": network.map_channels}
    settings = head_settings(**changes, width=options.width, depth=options.depth, coarse_width=options.coarse_width)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        images = torch.empty(1, settings.image_channels, network.image_size, network.image_size)
        maps = [torch.empty(1, c, n, n) for c, n in zip(network.widths, network.resolutions, strict=True)][::-1]
        DirectionHead(settings)(images, maps, torch.zeros(1))
    assert 0 < counter.get_total_flops() <= 0.03 * flops_per_evaluation(network)


def test_sizes_are_interpolated_between_the_timesteps_that_have_them():
    head = random_head()
    head.levels.copy_(torch.arange(NUM_LEVELS).float() ** 2 * torch.tensor([[1.0], [2.0], [3.0]]))
    position = 400 * (NUM_LEVELS - 1) / 999
    low = int(position)
    expected = low**2 + (position - low) * ((low + 1) ** 2 - low**2)
    actual = head.levels_at(TIMESTEPS)
    torch.testing.assert_close(actual[0], torch.tensor([0.0, expected, (NUM_LEVELS - 1) ** 2]))
    torch.testing.assert_close(actual[2], 3 * actual[0])


def test_the_output_is_in_units_of_the_direction_and_inputs_in_those_of_the_high_pass():
    head = three_level_head()
    expected = head(IMAGES, MAPS, TIMESTEPS)
    factors = torch.tensor([3.0, 5.0, 7.0])
    head.levels *= factors[:, None]
    scaled = IMAGES * torch.tensor([1, 1, 5.0, 7.0, 1])[:, None, None]
    torch.testing.assert_close(head(scaled, MAPS, TIMESTEPS), 3 * expected, rtol=1e-4, atol=1e-5)


def test_a_head_is_written_with_its_settings_and_read_back(tmp_path):
    head = three_level_head()
    file = read_checkpoint(write_head(tmp_path / "head.safetensors", head))
    assert file.model_settings == head.settings
    assert file.recommended["sag"]["site"] == "output.0"
    read = build_head(file)
    assert read.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(value, head.state_dict()[name]) for name, value in read.state_dict().items())
    torch.testing.assert_close(read(IMAGES, MAPS, TIMESTEPS), head(IMAGES, MAPS, TIMESTEPS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
def test_a_network_is_recognised_in_every_precision(precision):
    network = cast_weights(grey_unet(), precision, torch.device("cpu"))
    assert is_same_network(network_rms(grey_unet()), network)


def test_other_weights_and_other_networks_are_not_recognised():
    expected, other = network_rms(grey_unet()), grey_unet()
    other.out[2].weight *= 1.01
    assert not is_same_network(expected, other)
    assert not is_same_network(expected, grey_unet(num_res_blocks=2))
