"""Weights of one network as the beginning of another: the same but for its classes."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from sagl.errors import require
from sagl.models.adm import Classifier, UNet
from sagl.models.checkpoints import check_state_dict
from sagl.settings.network import UNetSettings

LABELS = "label_emb.weight"
"""(classes, width), and a row for the null label behind them where there is one."""

DEGRADED = "degraded_emb"
"""(width,): what a network is told when x_t was degraded."""


def load_pretrained_weights(network: UNet | Classifier, state: Mapping[str, Tensor]) -> str | None:
    """Load weights into a network of the same shape, or one that differs in its classes alone.

    Other classes begin as the mean of the old ones; in a network that had none, as zeros, which leave what it does
    unchanged. Where the null label alone is new or gone, the classes stay as they are. A classifier's last layer keeps
    its first weights where its classes are others.

    Returns:
        What was put in the old classes' place; None where they fit.

    Raises:
        UserError: names or shapes differ elsewhere: names the first five.
    """
    own, given = network.state_dict(), dict(state)
    said = _fit_logits(own, given) if isinstance(network, Classifier) else _fit_labels(network.settings, own, given)
    check_state_dict(own, given, " A checkpoint may differ from the network in its classes alone.")
    network.load_state_dict(given)
    return said


def _fit_logits(own: Mapping[str, Tensor], given: dict[str, Tensor]) -> str | None:
    """Keep a classifier's own last layer where the classes are others."""
    weight, bias = list(own)[-2:]
    old, new = (len(state[bias]) if bias in state else 0 for state in (given, own))
    if old in (0, new) or weight not in given or given[weight].shape[1:] != own[weight].shape[1:]:
        return None
    given |= {weight: own[weight], bias: own[bias]}
    return f"The checkpoint has {old} classes: the classifier's {new} are new, and its last layer begins anew."


def _fit_labels(settings: UNetSettings, own: Mapping[str, Tensor], given: dict[str, Tensor]) -> str | None:
    """Bring the embeddings to those of the network."""
    said = None
    if LABELS in own and len(given.get(LABELS, ())) != len(own[LABELS]):
        said, given[LABELS] = _labels(given.get(LABELS), own[LABELS], settings.num_classes or 0)
    if DEGRADED in own and DEGRADED not in given:
        given[DEGRADED] = torch.zeros_like(own[DEGRADED])  # which leaves what the network does unchanged
    if LABELS in given and LABELS not in own:
        said = f"{len(given.pop(LABELS))} labels of the checkpoint are dropped: the network is unconditional."
    return said


def _labels(old: Tensor | None, own: Tensor, classes: int) -> tuple[str, Tensor]:
    """What is to be said, and the new labels: (labels, width) like `own`."""
    if old is None:
        return f"The checkpoint has no labels: the network's {len(own)} begin as zeros.", torch.zeros_like(own)
    mean = old.float().mean(dim=0, keepdim=True).to(own)
    if sorted((len(old), len(own))) == [classes, classes + 1]:
        begin = "begins as the mean of the classes" if len(own) > len(old) else "is dropped"
        kept = torch.cat([old, mean])[: len(own)]
        return f"The checkpoint's {classes} classes are kept; the null label {begin}.", kept
    said = f"The checkpoint has {len(old)} labels: the network's {len(own)} are new, and begin as the mean of the old."
    return said, mean.repeat(len(own), 1)


def freeze(network: UNet | Classifier, patterns: Sequence[str]) -> None:
    """Take parameters out of the training: those whose name matches, such as input_blocks.* or time_embed.*.

    Raises:
        UserError: a pattern that matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        require(
            any(fnmatchcase(name, pattern) for name in names),
            f"`freeze` must match parameters such as {names[0]}, and {pattern!r} matches none.",
        )
    for name, parameter in network.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    require(any(p.requires_grad for p in network.parameters()), "`freeze` must leave something to train, got all.")
