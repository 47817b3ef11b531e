"""Checks between settings: what guidance, labels and a classifier require of a network. Needs no PyTorch."""

from collections.abc import Mapping

from sagl.errors import require
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import GuidanceSettings
from sagl.settings.network import ClassifierSettings, UNetSettings
from sagl.settings.sampling import RunSettings


def check_compatible(
    network: UNetSettings, diffusion: DiffusionSettings, guidances: Mapping[str, GuidanceSettings]
) -> None:
    """Check that the network can serve the process and every guidance whose scale is not 0.

    Raises:
        UserError: the network lacks the learned variance, or what a guidance needs.
    """
    require(
        network.learn_sigma or diffusion.variance != "learned_range",
        "`variance` learned_range needs a network with learn_sigma: true. Set fixed_small or fixed_large.",
    )
    for guidance in guidances.values():
        if guidance.scale and guidance.reuse_before is not None:
            network.require_output_block(guidance.reuse_before, group=f"{guidance.group}.")
        if guidance.scale:
            guidance.check_network(network)


def check_second_network(
    parameter: str,
    second: UNetSettings | ClassifierSettings,
    second_diffusion: DiffusionSettings,
    network: UNetSettings,
    diffusion: DiffusionSettings,
) -> None:
    """Check that a network which `parameter` names is for the images, classes and noise of the one that it guides.

    A UNet must not need labels that the other network does not have.

    Raises:
        UserError: names the difference.
    """
    s, n = (f"{s.in_channels} channels of {s.image_size}x{s.image_size} pixels" for s in (second, network))
    require(
        s == n and (network.num_classes == second.num_classes or None in (network.num_classes, second.num_classes)),
        f"`{parameter}` must be for {n} and the network's classes, got one for {s} and {second.num_classes} classes.",
    )
    require(
        network.num_classes is not None or not (isinstance(second, UNetSettings) and second.needs_labels),
        f"`{parameter}` must have a null label or no classes for a network without classes, got one of "
        f"{second.num_classes} classes without a null label.",
    )
    s, n = (f"a {s.noise_schedule} schedule of {s.num_timesteps} timesteps" for s in (second_diffusion, diffusion))
    require(s == n, f"`{parameter}` must be for the network's process, {n}, got one for {s}.")


def check_labels(
    samples: RunSettings, network: UNetSettings, guidances: Mapping[str, GuidanceSettings] | None = None
) -> None:
    """Check that the network has the labels of the samples, and that every guidance that needs labels gets them.

    Raises:
        UserError: labels for an unconditional network, an unknown class, no null label, guidance without labels.
    """
    num_classes = network.num_classes
    for name, guidance in (guidances or {}).items():
        require(
            not (guidance.scale and guidance.needs_labels) or (samples.labels != "null" and num_classes is not None),
            f"`{name}.scale` needs class labels, got a network without classes or `labels` null.",
        )
    if num_classes is None:
        require(
            samples.labels in ("random", "null"), f"`labels` is for class-conditional networks, got {samples.labels!r}."
        )
    elif samples.labels == "null":
        require(network.null_label, "`labels` null needs a network with a null label, got one without.")
    elif samples.labels not in ("random", "balanced"):
        largest = max(samples.label_list)
        require(largest < num_classes, f"`labels` must be classes 0 … {num_classes - 1}, got {largest}.")
