"""Pretrained networks by name: bundled ones and the ADM checkpoints of Dhariwal & Nichol (2021).

Loads no torch. ADM's two upsamplers (64 to 256, 128 to 512) are not included: their networks have a second image as
input, which sagl does not support.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from sagl.errors import UserError, require, suggest
from sagl.models.hub_files import download_from_hub, is_hub_name
from sagl.models.metadata import read_metadata, settings_from_metadata
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import ClassifierGuidance, GuidanceSettings
from sagl.settings.network import ClassifierSettings, NetworkSettings, UNetSettings

DEFAULT_MODEL = "emoji"
"""Name of the bundled UNet that commands use by default: 32x32 emoji, seven categories and a null label."""
BUNDLED = {
    name: Path(__file__).parent / "weights" / f"{name}.safetensors"
    for name in (DEFAULT_MODEL, "fashion_mnist", "fashion_mnist_classifier")
}
"""Bundled weight files by name. Each was trained with the config of its name."""
BUNDLED_CLASSIFIERS = {"fashion_mnist": "fashion_mnist_classifier"}
"""Bundled UNets that have a classifier to guide them, and its name."""
BUNDLED_REFERENCES = {"emoji": "emoji_test", "fashion_mnist": "fashion_mnist_test"}
"""Bundled UNets, and the test images of their data."""


@dataclass(frozen=True, kw_only=True)
class PretrainedEntry:
    """A released ADM checkpoint: its address, and the settings that its weights do not contain."""

    file: str
    """File name on the server and in the cache."""
    url: str
    """Address of the file."""
    licence: str = "MIT"
    """Licence of the repository that released the file; the weights have no other."""
    settings: NetworkSettings
    """Network settings, as in the flags of the public README; `dropout` is that of training."""
    diffusion: DiffusionSettings
    """Diffusion process of training; for a classifier, that of the UNet it guides."""
    config: str | None = None
    """Name of the packaged config with the paper's sampling settings."""


BASE_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
LINEAR = DiffusionSettings(noise_schedule="linear", num_timesteps=1000, variance="learned_range")
COSINE = DiffusionSettings(noise_schedule="cosine", num_timesteps=1000, variance="learned_range")

# The number of heads and the order of q, k and v leave no trace in the weights: a file loads with wrong ones, too.
UNET_64 = UNetSettings(
    image_size=64,
    num_channels=192,
    num_res_blocks=3,
    num_head_channels=64,
    use_new_attention_order=True,  # unlike all other released networks
    resblock_updown=True,
    dropout=0.1,
    num_classes=1000,
)
UNET_128 = UNetSettings(
    image_size=128,
    num_channels=256,
    num_res_blocks=2,
    num_heads=4,  # unlike all other released networks: a fixed number of heads
    use_new_attention_order=False,
    resblock_updown=True,
    num_classes=1000,
)
UNET_256 = UNetSettings(
    image_size=256,
    num_channels=256,
    num_res_blocks=2,
    num_head_channels=64,
    use_new_attention_order=False,
    resblock_updown=True,
)
UNET_256_COND = replace(UNET_256, num_classes=1000)
UNET_512 = replace(UNET_256_COND, image_size=512, channel_mult=())  # (): ADM's default for 512, not that of 256
UNET_LSUN = replace(UNET_256, dropout=0.1)


def _unet(
    file: str, settings: UNetSettings, config: str | None = None, diffusion: DiffusionSettings = LINEAR
) -> PretrainedEntry:
    return PretrainedEntry(file=file, url=BASE_URL + file, settings=settings, diffusion=diffusion, config=config)


def _classifier(size: int, *, num_res_blocks: int = 2, diffusion: DiffusionSettings = LINEAR) -> PretrainedEntry:
    settings = ClassifierSettings(
        image_size=size,
        num_channels=128,
        num_res_blocks=num_res_blocks,
        num_head_channels=64,
        use_new_attention_order=False,
        resblock_updown=True,
        pool="attention",
    )
    file = f"{size}x{size}_classifier.pt"
    return PretrainedEntry(file=file, url=BASE_URL + file, settings=settings, diffusion=diffusion)


RELEASED: dict[str, PretrainedEntry] = {
    "imagenet64": _unet("64x64_diffusion.pt", UNET_64, diffusion=COSINE),
    "imagenet128": _unet("128x128_diffusion.pt", UNET_128, "imagenet128"),
    "imagenet256_cond": _unet("256x256_diffusion.pt", UNET_256_COND, "imagenet256_cond"),
    "imagenet256_uncond": _unet("256x256_diffusion_uncond.pt", UNET_256, "imagenet256_uncond"),
    "imagenet512": _unet("512x512_diffusion.pt", UNET_512),
    "lsun_bedroom": _unet("lsun_bedroom.pt", UNET_LSUN),
    "lsun_cat": _unet("lsun_cat.pt", UNET_LSUN, "lsun_cat"),
    "lsun_horse": _unet("lsun_horse.pt", UNET_LSUN, "lsun_horse"),
    "lsun_horse_nodropout": _unet("lsun_horse_nodropout.pt", UNET_256),
    "imagenet64_classifier": _classifier(64, num_res_blocks=4, diffusion=COSINE),
    "imagenet128_classifier": _classifier(128),
    "imagenet256_classifier": _classifier(256),
    "imagenet512_classifier": _classifier(512),
}
"""Released checkpoints by name."""
UNET_NAMES = (
    *BUNDLED_REFERENCES,
    *(name for name, entry in RELEASED.items() if isinstance(entry.settings, UNetSettings)),
)
CLASSIFIER_NAMES = (*BUNDLED_CLASSIFIERS.values(), *(name for name in RELEASED if name not in UNET_NAMES))


def get_entry(name: str) -> PretrainedEntry:
    """Return the released checkpoint of a name.

    Raises:
        UserError: There is none, which names all networks and similar ones, or it is bundled.
    """
    _require_name(name, (*BUNDLED, *RELEASED))
    require(name not in BUNDLED, f"`model` must be a network that is downloaded, and {name} is part of the package.")
    return RELEASED[name]


def default_reference(model: str | None) -> str:
    """Return the reference of images of a bundled UNet: the test images of its data.

    Raises:
        UserError: the images are not those of a bundled UNet.
    """
    require(
        model in BUNDLED_REFERENCES,
        "`reference` must be given for images of other networks than the bundled ones, got none. It is a set of "
        f"images, such as {' or '.join(BUNDLED_REFERENCES.values())}, or a statistics file.",
    )
    return BUNDLED_REFERENCES[str(model)]


def name_from_filename(path: Path) -> str | None:
    """Return the name of the released checkpoint whose file has the name of `path`, in any folder."""
    return next((name for name, entry in RELEASED.items() if entry.file == path.name), None)


def get_settings(name: str) -> tuple[NetworkSettings, DiffusionSettings]:
    """Return the settings of a pretrained UNet or classifier and of its diffusion process.

    Raises:
        UserError: The name is unknown, or the network cannot be had from the Hub.
    """
    if name in BUNDLED or is_hub_name(name):
        path = BUNDLED[name] if name in BUNDLED else download_from_hub(name)
        return settings_from_metadata(read_metadata(path), path)
    entry = get_entry(name)
    return entry.settings, entry.diffusion


def get_unet_settings(name: str, argument: str = "model") -> tuple[UNetSettings, DiffusionSettings]:
    """Return the settings of a pretrained UNet and of its diffusion process.

    Raises:
        UserError: The name is unknown, or that of a classifier; names `argument`.
    """
    require(
        name not in CLASSIFIER_NAMES,
        f"`{argument}` must be a diffusion model, but {name} is a classifier, which goes into `classifier.checkpoint`.",
    )
    if not is_hub_name(name):
        _require_name(name, UNET_NAMES, argument)
    settings, diffusion = get_settings(name)
    require(isinstance(settings, UNetSettings), f"`{argument}` must be a diffusion model, but {name} is a classifier.")
    assert isinstance(settings, UNetSettings)
    return settings, diffusion


def get_classifier_settings(
    name: str, argument: str = "model.classifier"
) -> tuple[ClassifierSettings, DiffusionSettings]:
    """Return the settings of a pretrained classifier and of the diffusion process of the networks it guides.

    Raises:
        UserError: The name is unknown; names `argument`.
    """
    _require_name(name, CLASSIFIER_NAMES, argument)
    settings, diffusion = get_settings(name)
    assert isinstance(settings, ClassifierSettings)
    return settings, diffusion


def _require_name(name: str, names: tuple[str, ...], argument: str = "model") -> None:
    """Refuse an unknown name; suggest names that begin with it, or the most similar one."""
    if name in names:
        return
    longer = [other for other in names if name and other.startswith(name.lower())]
    hint = f" Did you mean {' or '.join(longer)}?" if longer else suggest(name.lower(), names)
    raise UserError(f"`{argument}` must be one of {', '.join(names)}; got {name!r}.{hint}")


def with_default_classifier(guidance: GuidanceSettings, model: str | None) -> GuidanceSettings:
    """Let the bundled classifier guide the bundled network `model` if classifier guidance is on and names none."""
    if isinstance(guidance, ClassifierGuidance) and guidance.scale and model in BUNDLED_CLASSIFIERS:
        return replace(guidance, checkpoint=guidance.checkpoint or BUNDLED_CLASSIFIERS[model])
    return guidance
