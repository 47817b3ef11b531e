"""Steps of a chain on the page: what they were made of, and the attention in them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sagl.diffusion.noise import initial_noise
from sagl.diffusion.predictor import Condition, Prediction, Trajectory, make_predictor
from sagl.diffusion.process import x0_hat_from_eps
from sagl.sampling.batch import full_batch
from sagl.sampling.pipeline import SamplingPipeline
from sagl.settings.guidance import GuidanceSettings
from sagl.settings.sampling import RunSettings
from sagl.shapes import AttentionSite, Image, Mask


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step of the samples of a batch, (B, C, H, W) each, on the CPU in half precision."""

    step: int
    x_t: Image
    x0_hat: Image
    eps: Image
    """Prediction without guidance."""
    weak_eps: Image | None
    """The eps' for which the term of the first guidance method is scale · (eps - eps'); None without such a term."""
    mask: Mask | None
    """(B, 1, H, W) bool or weights; None without a mask."""


def record_steps(
    pipeline: SamplingPipeline,
    samples: RunSettings,
    ids: Sequence[int],
    guidances: Mapping[str, GuidanceSettings],
    steps: Trajectory,
) -> Iterator[tuple[StepRecord, tuple[int, Image, Prediction]]]:
    """Yield every step of the batch that contains `ids` with the record of these ids.

    The records are computed from what the sampler yields. So the images are those of a run that records nothing.
    """
    batch_ids = full_batch(samples, ids)
    start = ids[0] - batch_ids[0]
    x_t = initial_noise(samples.seed, batch_ids, pipeline.image_shape)

    def to_record(tensor: Tensor) -> Tensor:
        return tensor[start : start + len(ids)].to("cpu", torch.float16)

    for step, x, prediction in steps:
        x_t = x_t.to(x)
        x0_hat = x0_hat_from_eps(x_t, prediction.eps, pipeline.schedule.alpha_bar(step), clip=True)
        terms = {name: term.eps for name, term in prediction.terms.items() if isinstance(term.eps, Tensor)}
        eps = prediction.eps - sum(terms.values()) if terms else prediction.eps
        differences = [term / guidances[name].scale for name, term in terms.items()]
        masks = [term.extras["mask"] for term in prediction.terms.values() if "mask" in term.extras]
        record = StepRecord(
            step=step,
            x_t=to_record(x_t),
            x0_hat=to_record(x0_hat),
            eps=to_record(eps),
            weak_eps=to_record(eps - differences[0]) if differences else None,
            mask=to_record(masks[0]) if masks else None,
        )
        yield record, (step, x, prediction)
        x_t = x


@torch.inference_mode()
def attention_received(pipeline: SamplingPipeline, x_t: Image, step: int, label: int, site: str) -> Tensor:
    """Return the attention that the tokens of one image receive: (1, C, H, W) -> (head, H', W'), mean 1.

    The network is evaluated again, because a chain that returned attention could have other last bits.
    """
    weight = next(pipeline.network.parameters())
    condition = Condition(
        labels=None if label < 0 else torch.tensor([label], device=weight.device),
        attention_sites=(AttentionSite(site),),
    )
    predict = make_predictor(pipeline.network, pipeline.schedule, pipeline.diffusion.variance)
    prediction = predict(x_t.to(weight.device, torch.float32), step, condition)
    return prediction.attention[AttentionSite(site)][0].float().cpu()
