"""Loss and accuracy of a classifier of noisy images.

Dhariwal & Nichol 2021, section 4.1: cross-entropy with the true label at x_t, t uniform over the network's process.
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
    """Loss and rank of the true class per sample, (B,)."""

    loss: PerSample
    """Cross-entropy, -log p(y | x_t), in nats."""
    num_higher: Tensor
    """Number of other classes that are at least as likely as the true one, int64; 0 is a correct prediction."""

    def accuracy(self, k: int = 1) -> PerSample:
        """Return the top-k accuracy: 1.0 if the true class is among the k likeliest, else 0.0."""
        return (self.num_higher < k).float()


def classifier_loss(
    classifier: Callable[[Image, Timestep], Tensor],
    x_0: Image,
    labels: Labels,
    timesteps: Timestep,
    noise: Image,
    schedule: Schedule,
) -> ClassifierLoss:
    """Compute the loss of one batch, each sample at its own timestep.

    Args:
        classifier: (x_t, timesteps) -> logits (B, classes).
        x_0: (B, C, H, W) in [-1, 1].
        labels: (B,) int64, true classes.
        timesteps: (B,) int64.
        noise: (B, C, H, W), standard normal.
        schedule: the whole process, not a respaced one.
    """
    logits = classifier(add_noise(x_0, noise, schedule.alpha_bar(timesteps)), timesteps)
    true_logit = logits.gather(1, labels[:, None])
    return ClassifierLoss(
        loss=F.cross_entropy(logits, labels, reduction="none"),
        num_higher=(logits >= true_logit).sum(dim=1) - 1,
    )
