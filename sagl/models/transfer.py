"""Fine-tuning: load weights of a network with other classes, and freeze parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from sagl.errors import require
from sagl.models.adm import Classifier, UNet
from sagl.models.checkpoints import read_state_dict
from sagl.models.loading import load
from sagl.models.metadata import WEIGHT_SUFFIXES
from sagl.models.state_dicts import check_state_dict
from sagl.models.zoo import name_from_filename
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import SETTINGS_CLASSES, ClassifierSettings, NetworkSettings, UNetSettings

LABELS = "label_emb.weight"
"""Label embeddings (classes, width), followed by that of the null label if there is one."""
DEGRADED = "degraded_emb"
"""Embedding (width,) that is added if x_t was degraded."""


def load_initial_weights(
    network: UNet | Classifier, diffusion: DiffusionSettings, checkpoint: str, weights: str = "ema"
) -> list[str]:
    """Load weights from a file, or of a network by its name.

    Args:
        network: the network.
        diffusion: the process that it is used with.
        checkpoint: file or name.
        weights: weights of a training checkpoint: ema, ema:DECAY or raw.

    Returns:
        Messages on how the classes were adapted, and on what differs in the process; none if all is the same.

    Raises:
        UserError: the checkpoint cannot be read, has weights of other shapes, or is of a network with other settings.
    """
    path = Path(checkpoint)
    if (path.suffix in WEIGHT_SUFFIXES or path.is_file()) and name_from_filename(path) is None:
        state_dict, settings, process = read_state_dict(path, weights)
    else:
        pretrained = load(checkpoint, weights)
        state_dict, settings, process = pretrained.state_dict, pretrained.model_settings, pretrained.diffusion
    adapted = load_pretrained_weights(network, state_dict, settings)
    if isinstance(settings, UNetSettings | ClassifierSettings):
        _check_architecture(network.settings, settings, checkpoint)
    changes = [
        f"{name} {old} (now {new})"
        for name, old in (asdict(process) if process else {}).items()
        if (new := getattr(diffusion, name)) != old
    ]
    other = f"The weights were trained with {', '.join(changes)}." if changes else None
    return [message for message in (adapted, other) if message]


def _check_architecture(
    network: UNetSettings | ClassifierSettings, file: UNetSettings | ClassifierSettings, checkpoint: str
) -> None:
    """Compare the settings that change the output of a network, but not the names and shapes of its weights.

    Raises:
        UserError: names the first that differs.
    """
    (key,) = (key for key, cls in SETTINGS_CLASSES.items() if isinstance(network, cls))
    for name, values in (
        ("use_new_attention_order", [settings.use_new_attention_order for settings in (file, network)]),
        ("num_head_channels or num_heads", [_num_heads(settings) for settings in (file, network)]),
    ):
        require(
            values[0] == values[1],
            f"`model.{key}` must have the {name} of the network of {checkpoint}: {values[0]}, got {values[1]}.",
        )


def _num_heads(settings: UNetSettings | ClassifierSettings) -> dict[str, int]:
    """Return the number of attention heads by block of a UNet, by width of a classifier."""
    if isinstance(settings, UNetSettings):
        return {site: settings.num_heads_at(site) for site in settings.sites}
    return {f"width {width}": settings.num_heads_for(width) for width in settings.widths}


def load_pretrained_weights(
    network: UNet | Classifier, state_dict: Mapping[str, Tensor], settings: NetworkSettings | None = None
) -> str | None:
    """Load weights into a network of the same architecture, which may have other classes.

    New label embeddings start as the mean of the old classes; without old ones they start as zeros, which do not change
    the output. A null label is kept. If only the null label is added or removed, the classes are kept. A classifier
    with other classes keeps the initial weights of its last layer.

    Args:
        network: the network.
        state_dict: the weights.
        settings: settings of the network that they are of; None if they are not known, as of a plain state dict, whose
            label embeddings are then those of classes, as ADM's are.

    Returns:
        A message on how the classes were adapted; None if they match.

    Raises:
        UserError: Names or shapes differ elsewhere; lists the first five.
    """
    target, source = network.state_dict(), dict(state_dict)
    if isinstance(network, Classifier):
        message = _adapt_logits(target, source)
    else:
        message = _adapt_embeddings(network.settings, target, source, settings)
    check_state_dict(target, source, " Only the classes of a checkpoint may differ from those of the network.")
    network.load_state_dict(source)
    return message


def _adapt_logits(target: Mapping[str, Tensor], source: dict[str, Tensor]) -> str | None:
    """Replace the last layer in `source` by that of the classifier, if the classes differ."""
    weight, bias = list(target)[-2:]
    if not {weight, bias} <= source.keys() or source[weight].shape[1:] != target[weight].shape[1:]:
        return None
    old, new = len(source[bias]), len(target[bias])
    if old == new:
        return None
    source |= {weight: target[weight], bias: target[bias]}
    return (
        f"The checkpoint has {old} classes, the classifier {new}: its last layer is trained from its initial weights."
    )


def _adapt_embeddings(
    settings: UNetSettings,
    target: Mapping[str, Tensor],
    source: dict[str, Tensor],
    source_settings: NetworkSettings | None,
) -> str | None:
    """Replace the embeddings in `source` by embeddings of the UNet's shapes."""
    if DEGRADED in target and DEGRADED not in source:
        source[DEGRADED] = torch.zeros_like(target[DEGRADED])  # does not change the output
    if LABELS not in target:
        if LABELS not in source:
            return None
        return f"The {len(source.pop(LABELS))} labels of the checkpoint are dropped: the network is unconditional."
    new = target[LABELS]
    if LABELS not in source:
        source[LABELS] = torch.zeros_like(new)
        return f"The checkpoint has no labels: the {len(new)} of the network start as zeros."
    old, has_null = source[LABELS], isinstance(source_settings, UNetSettings) and source_settings.null_label
    num_old, classes = len(old) - has_null, settings.num_classes or 0
    if len(old) == len(new) and (has_null == settings.null_label or source_settings is None):
        return None
    mean = old[:num_old].float().mean(dim=0, keepdim=True).to(new)
    rows = old[:num_old] if num_old == classes else mean.repeat(classes, 1)
    null_row = old[num_old:] if has_null else mean
    source[LABELS] = torch.cat([rows.to(new), null_row.to(new)])[: len(new)]
    message = f"The {classes} classes of the checkpoint are kept"
    if num_old != classes:
        message = f"The checkpoint has {num_old} classes: the {classes} of the network start as their mean"
    if has_null != settings.null_label:
        message += "; the null label is dropped" if has_null else "; the null label starts as the mean of the classes"
    return f"{message}."


def freeze(network: UNet | Classifier, patterns: Sequence[str]) -> None:
    """Exclude parameters from training whose names match a pattern, such as input_blocks.* or time_embed.*.

    Raises:
        UserError: A pattern matches nothing, or no parameter is left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        require(
            any(fnmatchcase(name, pattern) for name in names),
            f"`freeze` must match parameters such as {names[0]}, but {pattern!r} matches none.",
        )
    for name, parameter in network.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    trainable = any(parameter.requires_grad for parameter in network.parameters())
    require(trainable, f"`freeze` must leave parameters to train, but {list(patterns)} matches all.")
