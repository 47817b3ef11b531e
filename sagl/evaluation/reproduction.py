"""Tables and figures of the paper as commands, on the released networks or translated to another network."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sagl.evaluation.paper import PaperItem, PaperRow
from sagl.models.hub_files import is_hub_name
from sagl.models.zoo import CLASSIFIER_NAMES, UNET_NAMES, get_unet_settings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.network import UNetSettings
from sagl.utils.config_files import to_text


@dataclass(frozen=True, kw_only=True)
class Target:
    """The network on which a study is repeated, and the settings that replace the paper's."""

    name: str | None = None
    """Name of a network or path of a weight file; None for the paper's own networks."""
    network: UNetSettings | None = None
    """Settings of that network."""
    classifier: str | None = None
    """Classifier of that network."""
    num_samples: int | None = None
    """Largest number of images; None for the paper's."""
    sampler: str = "ddpm"
    respacing: str | None = None
    """Sampling steps; None for the paper's."""
    recommended: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the network's weight file recommends; a row replaces those of guidance that it does not name."""
    dino_checkpoint: str | None = None
    """File of DINO weights for its masks."""
    object_masks: str = "silhouette"
    """Object masks of the analysis overlap."""


@dataclass(frozen=True, kw_only=True)
class ReproductionRow:
    """One row of a table: the options of the command that makes its images, and the paper's numbers."""

    row: PaperRow
    options: tuple[str, ...] = ()
    """Options of `sagl sample` or `sagl analyze`; empty if the row cannot be made."""
    translation: tuple[str, ...] = ()
    """Settings that differ from the paper's."""
    obstacle: str = ""
    """Why the row cannot be made."""

    @property
    def run_name(self) -> str:
        """Name of the run folder, equal for equal options, so that tables share runs."""
        return f"run_{hashlib.sha256(os.fsencode(' '.join(self.options))).hexdigest()[:10]}"


@dataclass
class _Translator:
    """Collects options, and what was changed, for one row."""

    row: PaperRow
    target: Target
    analysis: str | None
    options: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    @property
    def paper_network(self) -> UNetSettings:
        return get_unet_settings(self.row.model)[0]

    def translate(self) -> ReproductionRow:
        """Return the row; a `LookupError` of a part becomes its obstacle."""
        try:
            self._add_network()
            self._add_sampler()
            for name, settings in self.row.guidances.items():
                self._add_guidance(name, settings)
            if self.analysis == "overlap" and self.target.object_masks != Target.object_masks:
                self.options += ["--object_masks", self.target.object_masks]
        except LookupError as error:
            return ReproductionRow(row=self.row, obstacle=str(error.args[0]))
        return ReproductionRow(row=self.row, options=tuple(self.options), translation=tuple(self.changes))

    def _add_network(self) -> None:
        name = self.target.name or self.row.model
        self.options += ["--model" if name in UNET_NAMES or is_hub_name(name) else "--checkpoint", name]
        if self.target.name:
            self.changes.append(f"network {name} (paper: {self.row.model})")
        network = self.target.network or self.paper_network
        if network.num_classes is not None and self.paper_network.num_classes is None:
            if not network.null_label:
                raise LookupError(f"{name} has no null label, and the paper's network no labels.")
            self.options += ["--labels", "null"]
        else:
            self.options += ["--labels", "random"]

    def _add_sampler(self) -> None:
        images = min(self.row.images, self.target.num_samples or self.row.images)
        respacing = self.target.respacing or str(self.row.steps)
        self.options += ["--num_samples", str(images), "--sampler", self.target.sampler, "--respacing", respacing]
        self.options += ["--eta", "0", "--clip_x0", "true"]  # the weight file may recommend others
        if self.row.first_id:
            self.options += ["--first_id", str(self.row.first_id)]
        if images != self.row.images:
            self.changes.append(f"{images} images (paper: {self.row.images})")
        if respacing != str(self.row.steps) or self.target.sampler != "ddpm":
            self.changes.append(f"{self.target.sampler} with respacing {respacing} (paper: ddpm, {self.row.steps})")

    def _add_guidance(self, name: str, settings: Mapping[str, Any]) -> None:
        values = dict(settings)
        scale = values.pop("scale", 0.0)
        if not scale and name != "sag" and name not in self.target.recommended:
            return
        self.options += [f"--{name}.scale", f"{scale:g}"]
        if name == "classifier" and scale:
            self.options += ["--classifier.checkpoint", self._classifier()]
        if name == "sag" and (scale or self.analysis):
            self.options += ["--sag.interval", "[0,1]"]
            translated = self._translate_sag(values)
            unnamed = self.target.recommended.get("sag", {}).keys() - translated.keys() - {"scale", "interval"}
            translated |= {setting: getattr(SelfAttentionGuidance, setting) for setting in unnamed}
            for setting, value in sorted(translated.items()):
                self.options += [f"--sag.{setting}", to_text(value)]

    def _classifier(self) -> str:
        if self.target.name is None and (own := f"{self.row.model}_classifier") in CLASSIFIER_NAMES:
            return own
        if self.target.classifier is None:
            raise LookupError(f"{self.target.name} has no classifier of noisy images.")
        return self.target.classifier

    def _translate_sag(self, values: dict[str, Any]) -> dict[str, Any]:
        network = self.target.network
        if values.get("mask") == "dino":
            if self.target.dino_checkpoint is None:
                raise LookupError("The mask needs DINO weights: set `dino_checkpoint`.")
            values["dino_checkpoint"] = self.target.dino_checkpoint
        if network is None:
            return values
        if "site" in values:
            site = translate_site(values["site"], self.paper_network, network)
            if site != values["site"]:
                self.changes.append(f"site {site} (paper: {values['site']})")
            values["site"] = site
        if "blur_sigma" in values:
            sigma = values["blur_sigma"] * network.image_size / self.paper_network.image_size
            self.changes.append(
                f"blur_sigma {sigma:g} (paper: {values['blur_sigma']:g} of {self.paper_network.image_size})"
            )
            values["blur_sigma"] = f"{sigma:g}"
        if values.get("kernel_size", 0) > 2 * network.image_size - 1:
            del values["kernel_size"]
        return values


def translate_site(site: str, source: UNetSettings, target: UNetSettings) -> str:
    """Return the block of another network with the role of `site`.

    The role of a block is the part of the network and the rank of its resolution among those with attention in this
    part: coarsest, intermediate or finest. The block is the last one with attention of that resolution.

    Raises:
        LookupError: the target has no such block; the message says so.
    """
    part, _, _ = site.partition(".")
    if part == "middle":
        return site
    sides = {name: side for name, side in source.sites.items() if name.startswith(part)}
    ranks = sorted(set(sides.values()))
    last = {side: name for name, side in target.sites.items() if name.startswith(part)}
    rank = ranks.index(sides[site])
    available = sorted(last)
    if rank in (0, len(ranks) - 1):
        return last[available[0 if rank == 0 else -1]]
    if len(available) < len(ranks):
        raise LookupError(
            f"The network has attention at {len(available)} resolutions of its {part} blocks, and {site} is at an "
            f"intermediate one of {len(ranks)}."
        )
    return last[available[rank]]


def plan_reproduction(item: PaperItem, target: Target) -> list[ReproductionRow]:
    """Return the rows of a table or figure as commands. Rows that become equal on the target are all kept."""
    return [_Translator(row, target, item.analysis).translate() for row in item.rows]
