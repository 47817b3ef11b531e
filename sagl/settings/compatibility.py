"""Whether settings go together: what is asked of a network, and what it has. Refused before any torch is loaded."""

from sagl.errors import require
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import ClassifierFreeGuidance, SelfAttentionGuidance, effective_kernel_size
from sagl.settings.network import ClassifierSettings, UNetSettings
from sagl.settings.sampling import RunSettings


def check_compatible(
    network: UNetSettings,
    diffusion: DiffusionSettings,
    sag: SelfAttentionGuidance | None = None,
    cfg: ClassifierFreeGuidance | None = None,
) -> None:
    """Refuse a process or a guidance that the network cannot serve; a guidance of scale 0 asks nothing.

    Raises:
        UserError: the variance is not the network's, the site has no attention, the kernel does not fit, there is
            no null label.
    """
    require(
        network.learn_sigma or diffusion.variance != "learned_range",
        "`variance` learned_range needs a network with learn_sigma: true. Set fixed_small or fixed_large.",
    )
    if sag and sag.scale:
        network.require_site(sag.site, sag.heads)
        effective_kernel_size(sag.kernel_size, network.image_size)
    require(
        not (cfg and cfg.scale) or network.null_label,
        "`cfg.scale` needs a class-conditional network with a null label; this one has none. Give --cfg.scale 0.",
    )


def check_classifier(
    classifier: ClassifierSettings,
    of_classifier: DiffusionSettings,
    network: UNetSettings,
    diffusion: DiffusionSettings,
) -> None:
    """Refuse a classifier of other images, classes or noise than those of the network that it is to guide.

    Args:
        classifier: what guides.
        of_classifier: the process that it was trained for.
        network: what is guided.
        diffusion: the process of that.

    Raises:
        UserError: says what is different.
    """
    c, n = (f"{s.in_channels} channels of {s.image_size}x{s.image_size} pixels" for s in (classifier, network))
    classes = network.num_classes in (None, classifier.num_classes)
    require(
        c == n and classes,
        f"`classifier.checkpoint` must be for {n} and the network's classes, and this one is for {c} and "
        f"{classifier.num_classes} classes.",
    )
    c, n = (f"a {s.noise_schedule} schedule of {s.num_timesteps} timesteps" for s in (of_classifier, diffusion))
    require(c == n, f"`classifier.checkpoint` must be for the network's process, {n}, and this one is for {c}.")


def check_labels(run: RunSettings, network: UNetSettings) -> None:
    """Refuse labels that the network does not know.

    Raises:
        UserError: labels for an unconditional network, a class that is not there, no null label.
    """
    classes = network.num_classes
    if classes is None:
        require(run.labels in ("random", "null"), f"`labels` is for class-conditional networks, got {run.labels!r}.")
        return
    if run.labels == "null":
        require(network.null_label, "`labels` null needs a network with a null label; this one has none.")
    elif run.labels not in ("random", "balanced"):
        most = max(run.label_list)
        require(most < classes, f"`labels` must be classes 0 … {classes - 1}, got {most}.")
