"""What `sagl sample` is to do: a request, checked against the weights, the machine and what its folder holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagl.commands.request import Request, Source
from sagl.errors import require
from sagl.models.metadata import read_metadata, settings_from_metadata
from sagl.sampling.run_folder import check_same_run, is_run, read_run_json
from sagl.settings.compatibility import check_compatible, check_labels
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import UNetSettings
from sagl.settings.sampling import RunSettings, micro_batches
from sagl.utils.distributed import num_processes, require_launcher, select_device
from sagl.utils.environment import available_bytes, default_precision
from sagl.utils.files import cache_folder, require_writable, sha256

if TYPE_CHECKING:  # torch is imported once the command line has been accepted
    from sagl.models.checkpoints import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request whose weights are at hand, and the folder that is to hold it."""

    request: Request
    weights: Path
    run: RunSettings
    settings: dict[str, Any]
    """All that decides an image; what a folder must have been made with to be continued."""
    record: dict[str, Any]
    """run.json as it is in the folder; empty for a new one."""

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.request.output

    @property
    def batches(self) -> list[range]:
        """Ids that are wanted of each micro-batch."""
        first, end = self.run.first_id, self.run.first_id + self.run.num_samples
        return [range(max(first, ids[0]), min(end, ids[-1] + 1)) for ids in micro_batches(self.run)]


def _refuse_contradictions(request: Request) -> None:
    """What can be seen to be impossible before any torch is loaded."""
    guided = any(guidance.scale for guidance in request.guidances.values())
    require(not request.compare or guided, "`compare` needs guidance, got scale 0. Give --sag.scale.")
    require_launcher(request.device)
    if not is_run(request.output):  # a whole run can be asked for where nothing can be written
        require_writable(request.output)


def job_of(request: Request) -> Job:
    """Find the weights, check what is asked against them and against what the folder holds.

    Raises:
        UserError: one does not go with the other.
    """
    _refuse_contradictions(request)
    network, diffusion = _known(request.source)
    check_compatible(network, diffusion, request.guidances)
    check_labels(request.run, network, request.guidances)
    from sagl.diffusion.respacing import respaced_timesteps

    respaced_timesteps(request.chain.respacing, diffusion.num_timesteps)
    weights = request.source.checkpoint or _fetched(request.source)
    request = _with_precision(request, read_run_json(request.output))
    settings = {**request.settings, "weights_sha256": _sha256(weights)}
    if request.source.network is not None:  # the file does not say, so the settings came from elsewhere
        settings |= {"network": asdict(network), "diffusion": asdict(diffusion)}
    record = check_same_run(request.output, settings)
    return Job(
        request=request,
        weights=weights,
        run=_sized(request, network, record),
        settings=settings,
        record=record,
    )


def _known(source: Source) -> tuple[Any, Any]:
    """Settings of network and process; a training checkpoint is opened for them, other files are not."""
    if source.network is not None:
        return source.network, source.diffusion or DiffusionSettings()
    assert source.checkpoint is not None
    if about := read_metadata(source.checkpoint):
        return settings_from_metadata(about, source.checkpoint)
    file = read_source(source, source.checkpoint)
    return file.model_settings, file.diffusion


def _with_precision(request: Request, record: Mapping[str, Any]) -> Request:
    """The request with its precision: as given, as the folder has it, or as suits the device."""
    if request.device.precision != "auto":
        return request
    found = record.get("settings", {}).get("precision")
    return replace(
        request, device=replace(request.device, precision=found or default_precision(select_device(request.device)))
    )


def _sized(request: Request, network: UNetSettings, record: dict[str, Any]) -> RunSettings:
    """The run with its batch size: as given, as the folder has it, or as suits the images' size and the memory."""
    run, found = request.run, record.get("batch_size")
    require(
        run.batch_size in (None, found) or found is None,
        f"`output` holds a run with batch_size {found}, got {run.batch_size}. Leave it out, or choose another folder.",
    )
    return replace(run, batch_size=run.batch_size or found or _suiting(request, network))


def _suiting(request: Request, network: UNetSettings) -> int:
    """Up to 64 images at once: on a CPU as many as its caches like, and no more than fit three quarters of memory."""
    from sagl.models.checkpoints import DTYPES
    from sagl.models.memory import estimate_memory

    device = select_device(request.device)
    most = 64 if device.type != "cpu" else max(1, min(64, (512 // network.image_size) ** 2))
    available = available_bytes(device)
    if available is not None:
        weights, each = estimate_memory(network, DTYPES[request.weight_precision])
        share = available // (num_processes(request.device)[0] if device.type == "cpu" else 1)
        most = min(most, max(1, (share * 3 // 4 - weights) // each))
    return min(request.run.num_samples, most)


def _fetched(source: Source) -> Path:
    from sagl.models.loading import download_pretrained

    assert source.name is not None
    return download_pretrained(source.name)


def _sha256(path: Path) -> str:
    from sagl.utils.digest_cache import cached_sha256

    if path.is_relative_to(cache_folder()):  # large, and read again and again
        return cached_sha256(path)
    return sha256(path)


def read_source(source: Source, path: Path) -> "Checkpoint":
    """The weights of a request, with their settings, from the file at hand.

    Raises:
        UserError: they do not go together.
    """
    from sagl.models.checkpoints import read_checkpoint

    return read_checkpoint(path, source.weights, source.network, source.diffusion)
