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
        if guidance.scale:
            guidance.check_network(network)


def check_classifier(
    classifier: ClassifierSettings,
    classifier_diffusion: DiffusionSettings,
    network: UNetSettings,
    diffusion: DiffusionSettings,
) -> None:
    """Check that a classifier is for the images, the classes and the noise of the network that it guides.

    Raises:
        UserError: names the difference.
    """
    c, n = (f"{s.in_channels} channels of {s.image_size}x{s.image_size} pixels" for s in (classifier, network))
    require(
        c == n and network.num_classes in (None, classifier.num_classes),
        f"`classifier.checkpoint` must be for {n} and the network's classes, got one for {c} and "
        f"{classifier.num_classes} classes.",
    )
    c, n = (f"a {s.noise_schedule} schedule of {s.num_timesteps} timesteps" for s in (classifier_diffusion, diffusion))
    require(c == n, f"`classifier.checkpoint` must be for the network's process, {n}, got one for {c}.")


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
