"""The Lightning shell around a classifier of noised images in training. No formulas."""

from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor

from sagl.diffusion.classifier_loss import ClassifierLoss, classifier_loss
from sagl.diffusion.schedule import make_schedule
from sagl.diffusion.timestep_samplers import UniformTimesteps
from sagl.errors import require
from sagl.models.adm import Classifier
from sagl.models.transfer import freeze as freeze_parameters
from sagl.models.zoo import get_classifier_settings
from sagl.modules.training_module import Batch, TrainingModule, seeded_init
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import ClassifierSettings
from sagl.settings.training import OptimizerSettings
from sagl.shapes import Image, Labels, Timestep


class ClassifierModule(TrainingModule):
    """ADM's classifier in training (Dhariwal & Nichol 2021, section 4.1): cross-entropy to the labels of noised images.

    Weights begin from the seed; noise and timesteps are drawn as for a network that draws.
    """

    network: Classifier

    def __init__(
        self,
        classifier: ClassifierSettings | str,
        diffusion: DiffusionSettings | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(learning_rate=3e-4, weight_decay=0.05),  # noqa: B008 (frozen)
        freeze: Sequence[str] = (),
        max_nonfinite_batches: int = 10,
        seed: int = 0,
    ) -> None:
        """Build the classifier.

        Args:
            classifier: its settings, or the name of a released one that has them.
            diffusion: the process of the network that it will guide; left out, the released classifier's, or ADM's.
            optimizer: AdamW and its rate; left out, as ADM trained its classifiers.
            freeze: parameters that stay as they are, by patterns of their names: input_blocks.*, time_embed.*.
            max_nonfinite_batches: a batch whose loss is not finite is skipped; after so many in a row the training ends.
            seed: of first weights, noise and timesteps.

        Raises:
            UserError: settings that cannot be met.
        """
        super().__init__(optimizer, max_nonfinite_batches, seed)
        named, of_name = (
            get_classifier_settings(classifier) if isinstance(classifier, str) else (classifier, DiffusionSettings())
        )
        self.diffusion_settings = diffusion or of_name
        settings = {"classifier": asdict(named), "diffusion": asdict(self.diffusion_settings)}
        more = {"freeze": list(freeze), "max_nonfinite_batches": max_nonfinite_batches, "seed": seed}
        self.save_hyperparameters({**settings, "optimizer": asdict(optimizer), **more})
        self.network = seeded_init(lambda: Classifier(named), seed)
        freeze_parameters(self.network, freeze)
        self.schedule = make_schedule(self.diffusion_settings)
        self.timestep_sampler = UniformTimesteps(num_timesteps=self.diffusion_settings.num_timesteps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of a batch, each sample at a timestep of its own; one that trains nothing, if it is not finite.

        Raises:
            UserError: an image without a label, or of a class too many; too many losses in a row were not finite.
        """
        x_0 = self._images(batch[0])
        drawn = self._drawn(x_0)
        seen = self._classified(x_0, batch[1], drawn.timesteps, drawn.noise)
        loss = seen.loss.mean()
        accuracies = {name: seen.accuracy(most).mean() for name, most in self._accuracies.items()}
        return loss if self._learns({"loss": loss, **accuracies}) else self._nothing()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy, each image at a timestep and noise of its own, whole and by quarter of the timesteps."""
        x_0 = self._images(batch[0])
        timesteps, noise = self._shown(x_0)
        seen = self._classified(x_0, batch[1], timesteps, noise)
        self._count("loss", seen.loss, timesteps)
        for name, most in self._accuracies.items():
            self._count(name, seen.accuracy(most), timesteps)

    def _classified(self, x_0: Image, labels: Labels, timesteps: Timestep, noise: Image) -> ClassifierLoss:
        self._require_classes(labels)
        there = timesteps.to(x_0.device), noise.to(x_0)
        return classifier_loss(self.network, x_0, labels, *there, self.schedule)

    def _require_classes(self, labels: Labels) -> None:
        """Refuse labels that the classifier has no logit for.

        Raises:
            UserError: says which.
        """
        least, most, classes = int(labels.min()), int(labels.max()), self.network.settings.num_classes
        require(least >= 0, "`data` must have a label for every image to train a classifier, and some have none.")
        require(
            most < classes,
            f"`model.classifier.num_classes` must be above every label of the data, got {classes} and a label {most}.",
        )

    @property
    def _accuracies(self) -> dict[str, int]:
        """How many of the likeliest classes count as an answer, by the name of the log: five where there are ten."""
        return {"accuracy": 1} | ({"accuracy_top_5": 5} if self.network.settings.num_classes >= 10 else {})
