"""LightningModule of the classifier of noisy images: loss and accuracies of a batch."""

from dataclasses import replace

from torch import Tensor

from sagl.diffusion.classifier_loss import ClassifierLoss, classifier_loss
from sagl.diffusion.timestep_samplers import UniformTimesteps
from sagl.errors import require
from sagl.models.adm import Classifier
from sagl.models.transfer import freeze
from sagl.models.zoo import get_classifier_settings
from sagl.modules.training_module import Batch, TrainingModule, seeded_init
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.training import ClassifierTrainingSettings
from sagl.shapes import Image, Labels, Timestep
from sagl.utils.prefetch import to_device


class ClassifierModule(TrainingModule):
    """Training of ADM's classifier (Dhariwal & Nichol 2021, section 4.1): cross-entropy to the labels of noisy images.

    `settings.diffusion` must be the process of the diffusion model that the classifier will guide.
    """

    network: Classifier

    def __init__(self, settings: ClassifierTrainingSettings) -> None:
        """Build the classifier.

        Raises:
            UserError: there is no released classifier of that name; `freeze` matches no parameter.
        """
        classifier, diffusion = settings.classifier, DiffusionSettings()
        if isinstance(classifier, str):
            classifier, diffusion = get_classifier_settings(classifier)
        classifier = settings.apply_to(classifier)
        super().__init__(replace(settings, classifier=classifier), settings.diffusion or diffusion)
        self.network_settings = classifier  # read by the data module
        self.network = seeded_init(lambda: Classifier(classifier), settings.seed)
        freeze(self.network, settings.freeze)
        self.timestep_sampler = UniformTimesteps(num_timesteps=self.diffusion_settings.num_timesteps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch, or a loss without gradients if it is not finite.

        Raises:
            UserError: an image has no label, or one that the classifier lacks; too many losses were not finite.
        """
        x_0 = self._to_float(batch[0])
        draw = self._sample_noise(x_0)
        result = self._compute_loss(x_0, batch[1], draw.timesteps, draw.noise)
        loss = result.loss.mean()
        accuracies = {name: result.accuracy(k).mean() for name, k in self._topk.items()}
        return loss if self._log_if_finite({"loss": loss, **accuracies}) else self._zero_loss()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate loss and accuracies, over all timesteps and by range."""
        x_0 = self._to_float(batch[0])
        timesteps, noise = self._validation_noise(self._next_validation_ids(len(x_0)), x_0.shape[1:])
        result = self._compute_loss(x_0, batch[1], timesteps, noise)
        self._accumulate("loss", result.loss, timesteps)
        for name, k in self._topk.items():
            self._accumulate(name, result.accuracy(k), timesteps)

    def _compute_loss(self, x_0: Image, labels: Labels, timesteps: Timestep, noise: Image) -> ClassifierLoss:
        low, high, num_classes = int(labels.min()), int(labels.max()), self.network.settings.num_classes
        require(low >= 0, "`data` must have a label for every image to train a classifier, got images without one.")
        require(
            high < num_classes,
            f"`model.classifier.num_classes` must be above every label of the data, got {num_classes} and a label "
            f"{high}.",
        )
        timesteps, noise = to_device(timesteps, x_0.device), to_device(noise, x_0.device).to(x_0.dtype)
        return classifier_loss(self._call_network, x_0, labels, timesteps, noise, self.schedule)

    @property
    def _topk(self) -> dict[str, int]:
        """Log names of the accuracies, with k: top 1, and top 5 for ten classes or more."""
        return {"accuracy": 1} | ({"accuracy_top_5": 5} if self.network.settings.num_classes >= 10 else {})
