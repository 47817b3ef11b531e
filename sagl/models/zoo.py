"""Networks by name, without loading torch: those that come with the package, and the released ADM checkpoints.

Of ADM's fifteen files the two upsamplers (64 to 256, 128 to 512) are left out: their networks take a second image,
and sagl has none of that kind.
"""

import difflib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from sagl.errors import UserError, require
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import AnySettings, ClassifierSettings, UNetSettings

Kind = TypeVar("Kind")

DEFAULT_MODEL = "fashion_mnist"
"""Name of the embedded network: 32x32 Fashion-MNIST, ten classes and a null label."""
DEFAULT_CLASSIFIER = "fashion_mnist_classifier"
"""Name of the embedded classifier, which guides the embedded network."""
WITHIN = {
    name: Path(__file__).parent / "weights" / f"{name}.safetensors" for name in (DEFAULT_MODEL, DEFAULT_CLASSIFIER)
}
"""Files that come with the package, by name; each was trained by the config of that name."""
EMBEDDED = WITHIN[DEFAULT_MODEL]
"""The embedded network's."""
METADATA_KEY = "sagl"
"""Where a safetensors file of sagl keeps its settings, as JSON."""

KINDS: dict[str, type[AnySettings]] = {"network": UNetSettings, "classifier": ClassifierSettings}
"""Under which name a file keeps the settings of either."""
OF_TRAINING = ("dropout", "use_checkpoint")
"""Settings of a network that change nothing in what it computes once it is trained."""


def read_metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself: network, diffusion, recommended; empty for other files.

    Raises:
        UserError: the file is damaged, or recommends other things than settings.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if path.stat().st_size != 8 + length + max(ends, default=0):
            raise ValueError("cut off, or something behind the tensors")
        about = dict(json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}")))
    except (struct.error, ValueError, AttributeError, TypeError, LookupError) as error:
        raise UserError(f"`checkpoint` must be a whole .safetensors file, and {path} is damaged.") from error
    require_recommended(about, path)
    return about


def settings_of(about: Mapping[str, Any], path: Path) -> tuple[AnySettings, DiffusionSettings]:
    """Network and process from what a file says of itself.

    Raises:
        UserError: it says something else.
    """
    try:
        name, kind = next((n, k) for n, k in KINDS.items() if n in about)
        return settings_from(kind, about[name]), settings_from(DiffusionSettings, about["diffusion"])
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"`checkpoint` must carry sagl's settings, and those in {path} are others.") from error


def settings_from(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Settings as a file has them, which may have any number where a whole one belongs.

    Raises:
        UserError: a number is not whole, or the settings refuse it.
        TypeError: they are of another kind.
    """
    for name, hint in get_type_hints(kind).items():
        value = values.get(name)
        broken = isinstance(value, float) and hint in (int, int | None)
        require(not broken, f"`{name}` must be a whole number, got {value}.")
    try:
        return kind(**values)
    except UserError:
        raise
    except (ValueError, OverflowError) as error:
        raise TypeError(str(error)) from error


def require_recommended(about: Mapping[str, Any], path: Path) -> None:
    """Refuse a file whose recommended settings are no settings.

    Raises:
        UserError: says what they are.
    """
    recommended = about.get("recommended") or {}
    require(
        isinstance(recommended, dict),
        f"`recommended` must be a mapping of sampling settings, and in {path} it is {recommended!r:.60}.",
    )


def require_same(asked: AnySettings, found: AnySettings, path: Path) -> None:
    """Refuse a file whose network is another than the one asked for; training's own settings may differ.

    Raises:
        UserError: names the first setting that differs.
    """
    there = asdict(found)
    for name, value in asdict(asked).items():
        other = there.get(name)
        if name not in OF_TRAINING and value != other:
            raise UserError(
                f"`checkpoint` {path} is for a network with {name} {other}, not {value}. Leave out --model."
            )


# ------------------------------------------------------------------------------------------ ADM's checkpoints


@dataclass(frozen=True, kw_only=True)
class Released:
    """A checkpoint of Dhariwal & Nichol (2021): where it is, and what cannot be read from its weights."""

    file: str
    """Name of the file, the same on the server and in the cache."""
    url: str
    """Address of the file."""
    licence: str
    """That of the repository which released it; no other is given for the weights."""
    settings: AnySettings
    """The network's, as in the flags of the public README; dropout is the training's."""
    diffusion: DiffusionSettings
    """The process it was trained for; of a classifier, that of the UNet which it guides."""
    config: str | None = None
    """Packaged configuration that holds the paper's sampling settings for it."""


BASE_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
"""The folder of all files."""
LINEAR = DiffusionSettings(noise_schedule="linear", num_timesteps=1000, variance="learned_range")
COSINE = DiffusionSettings(noise_schedule="cosine", num_timesteps=1000, variance="learned_range")
"""Of 64x64 images alone."""

# Heads and attention order leave no trace in the weights: a wrong one loads, runs, and makes worse images.
UNET_64 = UNetSettings(
    image_size=64,
    num_channels=192,
    num_res_blocks=3,
    num_head_channels=64,
    use_new_attention_order=True,  # alone among the released
    resblock_updown=True,
    dropout=0.1,
    num_classes=1000,
)
UNET_128 = UNetSettings(
    image_size=128,
    num_channels=256,
    num_res_blocks=2,
    num_heads=4,  # alone in a fixed number of heads, whatever the width
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
UNET_512 = replace(UNET_256_COND, image_size=512, channel_mult=())  # (): ADM's own for 512, not those of 256
UNET_LSUN = replace(UNET_256, dropout=0.1)


def _unet(
    file: str, settings: UNetSettings, config: str | None = None, diffusion: DiffusionSettings = LINEAR
) -> Released:
    return Released(
        file=file, url=BASE_URL + file, licence="MIT", settings=settings, diffusion=diffusion, config=config
    )


def _classifier(size: int, *, num_res_blocks: int = 2, diffusion: DiffusionSettings = LINEAR) -> Released:
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
    return Released(file=file, url=BASE_URL + file, licence="MIT", settings=settings, diffusion=diffusion)


RELEASED: dict[str, Released] = {
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
"""By the names that the command line takes."""
NETWORKS = (DEFAULT_MODEL, *(name for name, entry in RELEASED.items() if isinstance(entry.settings, UNetSettings)))
"""Names of the networks that draw."""
CLASSIFIERS = (DEFAULT_CLASSIFIER, *(name for name in RELEASED if name not in NETWORKS))
"""Names of the classifiers of noised images."""


def released(name: str) -> Released:
    """The released checkpoint of that name.

    Raises:
        UserError: there is none; names all, and the nearest.
    """
    if name not in RELEASED:
        raise _unknown(name, (*WITHIN, *RELEASED))
    return RELEASED[name]


def name_from_filename(path: Path) -> str | None:
    """The released checkpoint whose file is called so, wherever it lies."""
    return next((name for name, entry in RELEASED.items() if entry.file == path.name), None)


def settings_named(name: str) -> tuple[AnySettings, DiffusionSettings]:
    """Settings of a network by its name, and of its process: an embedded or a released one, classifiers too.

    Raises:
        UserError: there is none of that name; names all, and the nearest.
    """
    if name in WITHIN:
        return settings_of(read_metadata(WITHIN[name]), WITHIN[name])
    entry = released(name)
    return entry.settings, entry.diffusion


def get_unet_settings(name: str) -> tuple[UNetSettings, DiffusionSettings]:
    """Settings of a network that draws, and of its process: the embedded or a released one.

    Raises:
        UserError: there is none of that name; names all, and the nearest.
    """
    require(
        name not in CLASSIFIERS,
        f"`model` must be a network that draws, and {name} is a classifier: see --classifier.checkpoint.",
    )
    if name not in NETWORKS:
        raise _unknown(name, NETWORKS)
    settings, diffusion = settings_named(name)
    assert isinstance(settings, UNetSettings)
    return settings, diffusion


def classifier_named(name: str) -> tuple[ClassifierSettings, DiffusionSettings]:
    """Settings of a classifier, and of the process of the networks that it guides: the embedded or a released one.

    Raises:
        UserError: there is none of that name; names all, and the nearest.
    """
    if name not in CLASSIFIERS:
        raise _unknown(name, CLASSIFIERS, "model.classifier")
    settings, diffusion = settings_named(name)
    assert isinstance(settings, ClassifierSettings)
    return settings, diffusion


def _unknown(name: str, known: tuple[str, ...], argument: str = "model") -> UserError:
    asked = name.lower()
    longer = [other for other in known if asked and other.startswith(asked)]
    suggest = longer or difflib.get_close_matches(asked, known, n=1)
    hint = f" Did you mean {' or '.join(suggest)}?" if suggest else ""
    return UserError(f"`{argument}` must be one of {', '.join(known)}; got {name!r}.{hint}")
