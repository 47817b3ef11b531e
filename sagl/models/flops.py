"""Floating-point operations of a network, counted on the meta device without computing."""

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from sagl.models.adm import UNet
from sagl.settings.network import UNetSettings


@lru_cache(maxsize=8)
def flops_per_evaluation(settings: UNetSettings, start: str | None = None) -> int:
    """Return the operations of one image's forward pass: convolutions and matrix products, a multiply-add as two.

    With `start`, the pass begins with the input of this output block, as `UNet.forward` does.
    """
    s = settings
    with torch.device("meta"), torch.inference_mode():
        labels = None if s.num_classes is None else torch.zeros(1, dtype=torch.long)
        network = UNet(s).eval()
        inputs = (torch.empty(1, s.in_channels, s.image_size, s.image_size), torch.zeros(1), labels)
        reused = None if start is None else (start, network(*inputs, block_inputs=[start]).block_inputs[start])
        with FlopCounterMode(display=False) as counter:
            network(*inputs, start=reused)
    return int(counter.get_total_flops())
