"""Precision and batch size of a sampling run, chosen for the machine where they are left open.

torch is imported inside the functions that compute, so that a request can be refused before it is loaded.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sagl.errors import UserError, require
from sagl.settings.guidance import ClassifierGuidance
from sagl.settings.network import ClassifierSettings, UNetSettings
from sagl.utils.distributed import num_processes, select_device
from sagl.utils.environment import available_bytes, default_precision

if TYPE_CHECKING:
    from sagl.sampling.run import SampleConfig


def choose_precision(config: "SampleConfig", metadata: Mapping[str, Any]) -> "SampleConfig":
    """Replace the precision auto by that of the folder, or by the fastest one of the device."""
    devices = config.devices
    if devices.precision != "auto":
        return config
    precision = metadata.get("settings", {}).get("precision") or default_precision(select_device(devices))
    return replace(config, devices=replace(devices, precision=precision))


def choose_batch_size(config: "SampleConfig", network: UNetSettings, metadata: Mapping[str, Any]) -> "SampleConfig":
    """Replace a missing batch size by that of the folder, or by one that suits image size and memory.

    Raises:
        UserError: the folder has another one.
    """
    samples, old = config.samples, metadata.get("batch_size")
    require(
        old is None or samples.batch_size in (None, old),
        f"`output` contains a run with batch_size {old}, got {samples.batch_size}. Leave it out, or choose another "
        "folder.",
    )
    size = samples.batch_size or old or default_batch_size(config, network)
    return replace(config, samples=replace(samples, batch_size=size))


def _classifier_settings(config: "SampleConfig") -> ClassifierSettings | None:
    """Return the settings of the classifier that guides the run; None if there is none, or it cannot be loaded."""
    from sagl.models.loading import load

    guidance = config.guidances.get("classifier")
    if not isinstance(guidance, ClassifierGuidance) or not guidance.scale or guidance.checkpoint is None:
        return None
    try:
        settings = load(guidance.checkpoint).model_settings
    except UserError:  # building the guidance will raise it again, with the name of the setting
        return None
    return settings if isinstance(settings, ClassifierSettings) else None


def default_batch_size(config: "SampleConfig", network: UNetSettings) -> int:
    """Return up to 64; on a CPU at most what suits its caches, and never more than three quarters of memory hold.

    Raises:
        UserError: not even one image fits into the free memory.
    """
    from sagl.models.checkpoints import DTYPES
    from sagl.models.memory import estimate_gradient_memory, estimate_memory, max_batch_size

    assert config.devices.precision != "auto"
    device, dtype = select_device(config.devices), DTYPES[config.devices.precision]
    size = (
        min(64, max_batch_size(network)) if device.type != "cpu" else max(1, min(64, (512 // network.image_size) ** 2))
    )
    free_bytes = available_bytes(device)
    if free_bytes is not None:
        weight_bytes, image_bytes = estimate_memory(network, dtype)
        if classifier := _classifier_settings(config):
            classifier_bytes, gradient_bytes = estimate_gradient_memory(classifier, dtype)
            weight_bytes, image_bytes = weight_bytes + classifier_bytes, max(image_bytes, gradient_bytes)
        require(
            weight_bytes + image_bytes <= free_bytes,
            f"`checkpoint` needs {(weight_bytes + image_bytes) / 1e9:.1f} GB for one image, and {free_bytes / 1e9:.1f} "
            f"GB are free. Take a smaller network than one of image_size {network.image_size}, or another machine.",
        )
        share = free_bytes // (num_processes(config.devices)[0] if device.type == "cpu" else 1)
        size = min(size, max(1, (share * 3 // 4 - weight_bytes) // image_bytes))
    return min(config.samples.num_samples, size)
