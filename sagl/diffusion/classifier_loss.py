"""How well a classifier knows noised images: what its training minimises, and its accuracy.

Dhariwal & Nichol 2021, section 4.1: cross-entropy to the true label at x_t, t uniform over the same process.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from sagl.diffusion.process import add_noise
from sagl.diffusion.schedule import Schedule
from sagl.shapes import Image, Labels, PerSample, Timestep


@dataclass(frozen=True, kw_only=True)
class ClassifierLoss:
    """Per sample, (B,)."""

    loss: PerSample
    """Cross-entropy to the true label, -log p(y | x_t), in nats."""
    rank: Tensor
    """int64: how many other classes are held at least as likely as the true one; 0 is right."""

    def accuracy(self, most: int = 1) -> PerSample:
        """1.0 where the true class is among the `most` likeliest, else 0.0."""
        return (self.rank < most).float()


def classifier_loss(
    classify: Callable[[Image, Timestep], Tensor],
    x_0: Image,
    labels: Labels,
    timesteps: Timestep,
    noise: Image,
    schedule: Schedule,
) -> ClassifierLoss:
    """One batch, each sample noised to its own timestep of the whole process.

    Args:
        classify: (x_t, timesteps) -> logits (B, classes).
        x_0: (B, C, H, W) in [-1, 1].
        labels: (B,) int64, true classes.
        timesteps: (B,) int64.
        noise: (B, C, H, W), standard normal.
        schedule: the whole process, not a respaced one.
    """
    logits = classify(add_noise(x_0, noise, schedule.alpha_bar(timesteps)), timesteps)
    of_truth = logits.gather(1, labels[:, None])
    return ClassifierLoss(
        loss=F.cross_entropy(logits, labels, reduction="none"),
        rank=(logits >= of_truth).sum(dim=1) - 1,
    )
