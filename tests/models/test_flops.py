import pytest
import torch
from torch import nn

from sagl.models.adm import AttentionBlock
from sagl.models.flops import flops_per_evaluation
from tests.helpers.networks import stable_unet


@pytest.mark.parametrize("start", [None, "output.1"])
@pytest.mark.parametrize("changes", [{}, {"num_classes": None, "null_label": False}])
def test_flops_are_those_of_all_layers_and_of_attention(changes, start):
    """A multiply-add is two; attention is two products of L queries with L keys or values of width C."""
    network, expected = stable_unet(**changes), []
    labels = None if "num_classes" in changes else torch.tensor([0])
    inputs = (torch.zeros(1, 3, 16, 16), torch.zeros(1), labels)
    with torch.inference_mode():
        reused = start and (start, network(*inputs, block_inputs=[start]).block_inputs[start])

    def count(layer, inputs, output):
        if isinstance(layer, nn.Conv2d | nn.Conv1d | nn.Linear):
            expected.append(2 * output.numel() * layer.weight[0].numel())
        elif isinstance(layer, AttentionBlock):
            channels, tokens = inputs[0].shape[1], inputs[0].shape[2:].numel()
            expected.append(2 * 2 * tokens**2 * channels)

    for layer in network.modules():
        layer.register_forward_hook(count)
    with torch.inference_mode():
        network(*inputs, start=reused)
    assert flops_per_evaluation(network.settings, start) == sum(expected)
