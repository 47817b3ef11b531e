"""A network on the Hugging Face Hub: weights as safetensors, settings beside them, a model card of ours.

Needs the extra `hub`; nothing else in sagl imports this.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin

from sagl.errors import UserError
from sagl.models.adm import UNet
from sagl.models.checkpoints import Checkpoint, build_network, check_state_dict
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import UNetSettings

CARD = """---
library_name: sagl
pipeline_tag: unconditional-image-generation
tags:
- diffusion
- self-attention-guidance
---
# {title}

An ADM network (Dhariwal & Nichol 2021) for {side}x{side} images, {classes}, {millions:.1f} million parameters, in
OpenAI's parameter names; to be sampled with self-attention guidance (Hong et al. 2023).

```python
from sagl.models.hub import HubUNet

file = HubUNet.from_pretrained("{repository}").file
```

| setting | value |
|---|---|
{rows}

What it was trained on, for what it may be used, and how good its images are is for its makers to add here.
"""


class HubUNet(UNet, PyTorchModelHubMixin):
    """An ADM UNet with `from_pretrained`, `save_pretrained` and `push_to_hub`; strict in what it loads."""

    def __init__(
        self, settings: UNetSettings, diffusion: DiffusionSettings, recommended: dict[str, Any] | None = None
    ) -> None:
        """An untrained network.

        Args:
            settings: of the UNet.
            diffusion: the process it is for.
            recommended: sampling settings to advise, by flag name.
        """
        super().__init__(settings)
        self.diffusion, self.recommended = diffusion, recommended or {}

    @classmethod
    def of(cls, file: Checkpoint) -> "HubUNet":
        """The network of a file, to be pushed.

        Raises:
            UserError: its weights do not fit its settings.
        """
        trained = build_network(file)
        network = cls(trained.settings, file.diffusion, dict(file.recommended))
        network.load_state_dict(trained.state_dict())
        return network.eval()

    @property
    def file(self) -> Checkpoint:
        """What `sagl.sampling.pipeline` and `sagl convert` work with."""
        return Checkpoint(
            model_settings=self.settings,
            diffusion=self.diffusion,
            state_dict=self.state_dict(),
            recommended=self.recommended,
        )

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:  # noqa: ANN401
        """In evaluation mode; always strict, with the difference in words.

        Raises:
            UserError: names or shapes are others.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(model_file, device=map_location)
        except SafetensorError as error:
            raise UserError(f"`checkpoint` must be a whole .safetensors file, and {model_file} is damaged.") from error
        check_state_dict(model.state_dict(), state)
        model.load_state_dict(state, strict=True)
        return model.eval()

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:  # noqa: ANN401
        """Where the Hub has no safetensors.

        Raises:
            UserError: always: such weights would be taken whatever their names are.
        """
        raise UserError(
            f"`checkpoint` must be on the Hub as model.safetensors, and there is {Path(model_file).name} alone. "
            "sagl convert writes safetensors."
        )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # noqa: ANN401
        """Upload weights, settings and card; returns the commit's address."""
        return super().push_to_hub(repo_id, **{"model_card_kwargs": {"repo_id": repo_id}, **kwargs})

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:  # noqa: ANN401 (the mixin's own)
        """What can be said of any network; the rest is its makers' to add."""
        s = self.settings
        rows = [f"| `{name}` | {value} |" for part in (s, self.diffusion) for name, value in asdict(part).items()]
        text = CARD.format(
            title=f"ADM {s.image_size}x{s.image_size}",
            side=s.image_size,
            classes=f"{s.num_classes} classes" if s.num_classes else "unconditional",
            millions=sum(parameter.numel() for parameter in self.parameters()) / 1e6,
            repository=kwargs.get("repo_id") or "OWNER/NAME",
            rows="\n".join(rows),
        )
        return ModelCard(text)
