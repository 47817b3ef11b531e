"""Networks of the page: that of the last row, and the last ones that guided it."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.guidance.base import Guidance, identity
from sagl.guidance.masks import load_class_attention
from sagl.models.adm import UNet
from sagl.sampling.guidance_files import guidance_files
from sagl.sampling.pipeline import SamplingPipeline, build_pipeline, load_noisy_classifier, load_weak_network
from sagl.sampling.run import SamplingRun
from sagl.settings.diffusion import DiffusionSettings
from sagl.shapes import Image
from sagl.utils.distributed import select_device
from sagl.utils.files import file_version

MAX_GUIDANCE_NETWORKS = 4
"""Number of the last classifiers, weaker networks and DINO transformers that are kept."""
GuidanceNetwork = TypeVar("GuidanceNetwork")


class LoadedNetworks:
    """The network of the last row, and the last networks that guided it, each loaded once per version of its file.

    Nothing else on the page keeps a network, so that the memory of one is free as soon as it is dropped here.
    """

    def __init__(self) -> None:
        self._key = ""
        self._network: tuple[UNet, DiffusionSettings] | None = None
        self._guidance_networks: OrderedDict[tuple[str, bytes, str], Any] = OrderedDict()

    def build_pipeline(self, run: SamplingRun) -> SamplingPipeline:
        """Build the pipeline of a run, with networks that are loaded already where it has the same files.

        Raises:
            UserError: weights cannot be read, or do not fit the settings.
        """
        network, diffusion = self._load_network(run)
        files = guidance_files(run.config.guidances, run.checkpoint)

        def load_once(parameter: str, load: Callable[[], GuidanceNetwork], weights: str = "ema") -> GuidanceNetwork:
            return self._load_once(parameter, files[parameter], weights, load)

        return build_pipeline(
            network,
            diffusion,
            run.config.sampler,
            run.config.guidances,
            checkpoint=run.checkpoint,
            load_classifier=lambda name: load_once(
                "classifier.checkpoint", lambda: load_noisy_classifier(name, network, diffusion)
            ),
            load_network=lambda name, weights: load_once(
                "autoguidance.checkpoint", lambda: load_weak_network(name, weights, network, diffusion), weights
            ),
            load_attention=lambda path: load_once("sag.dino_checkpoint", lambda: load_class_attention(path)),
        )

    def _load_network(self, run: SamplingRun) -> tuple[UNet, DiffusionSettings]:
        """Return the network of a run, and its diffusion process."""
        key = f"{file_version(run.checkpoint)!r} {run.config.source} {run.config.devices}"
        if self._network is None or self._key != key:
            self._network = None  # frees its memory first
            self._guidance_networks.clear()  # they have its device and precision, and were checked against it
            self._network = run.load_network(select_device(run.config.devices))
            self._key = key
        return self._network

    def _load_once(
        self, parameter: str, path: Path, weights: str, load: Callable[[], GuidanceNetwork]
    ) -> GuidanceNetwork:
        """Return the network of a version of a file; the network that was not used for longest is dropped first."""
        key = parameter, file_version(path), weights
        if key not in self._guidance_networks:
            while len(self._guidance_networks) >= MAX_GUIDANCE_NETWORKS:
                self._guidance_networks.popitem(last=False)
            self._guidance_networks[key] = load()
        self._guidance_networks.move_to_end(key)
        network: GuidanceNetwork = self._guidance_networks[key]
        return network


def without_networks(guidance: Guidance) -> Guidance:
    """Return what determines the cost of a guidance, without its functions, which hold its networks."""
    return replace(guidance, term=_no_term, prepare_condition=identity, mask=None, start_chain=None)


def _no_term(_: NoisePredictor, __: Image, ___: int, ____: Condition, _____: Prediction) -> GuidanceTerm:
    raise NotImplementedError("This guidance has its cost alone, and nothing to sample with.")
