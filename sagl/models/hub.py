"""UNets on the Hugging Face Hub. Needs the extra `hub`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin

from sagl.errors import UserError
from sagl.models.adm import UNet
from sagl.models.checkpoints import NetworkWeights, read_state_dict, write_checkpoint
from sagl.models.hub_files import WEIGHT_FILE, is_hub_name
from sagl.models.state_dicts import check_state_dict
from sagl.models.zoo import CLASSIFIER_NAMES, UNET_NAMES
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import FILE_SETTINGS
from sagl.settings.network import UNetSettings
from sagl.utils.config_files import flatten

CARD = """---
{{ card_data }}
---
# ADM {{ settings.image_size }}x{{ settings.image_size }}

An ADM network (Dhariwal & Nichol 2021) for {{ settings.image_size }}x{{ settings.image_size }} images with
{{ "%.1f" | format(millions) }} million parameters, {{ settings.num_classes or "no" }} classes, and OpenAI's parameter
names. It can be sampled with self-attention guidance (Hong et al. 2023).
{% if has_grid %}
![Images of this network](grid.png)
{% endif %}
```bash
sagl sample --model hf:{{ repo_id | default('OWNER/NAME') }}
```
```python
from sagl.models.hub import HubUNet

checkpoint = HubUNet.from_pretrained("{{ repo_id | default('OWNER/NAME') }}").checkpoint
```

{% if metrics -%}
## Metrics
| metric | value (95 % interval) | images, reference, features |
|---|---|---|
{% for row in metrics -%}
| {{ row.name }} | {{ row.value }} | {{ row.of }} |
{% endfor %}
{% endif -%}
{% for title, values in tables.items() if values -%}
## {{ title }}
| setting | value |
|---|---|
{% for name, value in values.items() -%}
| `{{ name }}` | {{ value }} |
{% endfor %}
{% endfor -%}
Please add: training data, intended use, quality of the images.
"""


def without_local_files(recommended: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return recommended settings without those that need a file of this machine, and the names of the latter.

    A guidance method that cannot do without the file is left out as a whole. A direction head is not uploaded, and its
    second evaluation takes its place. Names of released networks and of networks of the Hub are no files.
    """
    kept, left_out = dict[str, Any](), list[str]()
    for name, value in recommended.items():
        group = value if isinstance(value, dict) else {}
        files = [key for key, path in group.items() if key.endswith(FILE_SETTINGS) and path and not _is_name(path)]
        if "checkpoint" in files or ("dino_checkpoint" in files and group.get("mask") == "dino"):
            left_out.append(name)
            continue
        left_out += [f"{name}.{key}" for key in files]
        kept[name] = {key: part for key, part in group.items() if key not in files} if group else value
    return kept, left_out


def _is_name(value: object) -> bool:
    return value in (*UNET_NAMES, *CLASSIFIER_NAMES) or is_hub_name(value)


class HubUNet(
    UNet,
    PyTorchModelHubMixin,
    library_name="sagl",
    pipeline_tag="unconditional-image-generation",
    tags=["diffusion", "self-attention-guidance"],
    model_card_template=CARD,
):
    """An ADM UNet with `from_pretrained`, `save_pretrained` and `push_to_hub`, which loads strictly."""

    def __init__(
        self, settings: UNetSettings, diffusion: DiffusionSettings, recommended: dict[str, Any] | None = None
    ) -> None:
        """Build an untrained network.

        Args:
            settings: Settings of the UNet.
            diffusion: Settings of its diffusion process.
            recommended: Recommended sampling settings, by parameter name.
        """
        super().__init__(settings)
        self.diffusion, self.recommended = diffusion, recommended or {}

    @classmethod
    def from_checkpoint(cls, checkpoint: NetworkWeights) -> "HubUNet":
        """Build the network of a checkpoint, in evaluation mode, without recommended settings that need other files.

        Those that are left out are printed.

        Raises:
            UserError: It is a classifier or head, or its weights do not match its settings.
        """
        settings = checkpoint.model_settings
        if not isinstance(settings, UNetSettings):
            raise UserError("`checkpoint` must be a diffusion model, but it is a classifier or a head.")
        recommended, left_out = without_local_files(checkpoint.recommended)
        if left_out:
            print(f"Left out of the recommended settings, as they need files of this machine: {', '.join(left_out)}.")
        network = cls(settings, checkpoint.diffusion, recommended)
        check_state_dict(network.state_dict(), checkpoint.state_dict)
        network.load_state_dict(checkpoint.state_dict)
        return network.eval()

    @property
    def checkpoint(self) -> NetworkWeights:
        """Weights and settings, for `sagl.sampling.pipeline` and `write_checkpoint`."""
        return NetworkWeights(
            model_settings=self.settings,
            diffusion=self.diffusion,
            state_dict=self.state_dict(),
            recommended=self.recommended,
        )

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:  # noqa: ANN401
        """Load weights, in evaluation mode; always strict, unlike the mixin.

        Raises:
            UserError: The file is damaged or contains code, or names or shapes differ.
        """
        state_dict = read_state_dict(Path(model_file)).state_dict
        check_state_dict(model.state_dict(), state_dict)
        model.load_state_dict(state_dict)
        return model.eval()

    _load_as_pickle = _load_as_safetensor

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # noqa: ANN401
        """Upload weights, settings and model card; return the address of the commit."""
        return super().push_to_hub(repo_id, **{"model_card_kwargs": {"repo_id": repo_id}, **kwargs})

    def _save_pretrained(self, save_directory: Path) -> None:
        write_checkpoint(self.checkpoint, save_directory / WEIGHT_FILE)

    def generate_model_card(
        self,
        *,
        licence: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> ModelCard:
        """Return the model card.

        Args:
            licence: identifier of the licence of the weights.
            sampling: settings of the run that the card shows.
            **kwargs: further variables of the template: `repo_id`, `has_grid`, `metrics`.
        """
        info = self._hub_mixin_info.model_card_data.to_dict()
        tables = {
            "Sampling": sampling,
            "Recommended sampling": flatten(self.recommended),
            "Network": asdict(self.settings) | asdict(self.diffusion),
        }
        card = ModelCard.from_template(
            ModelCardData(**{**info, **({"license": licence} if licence else {})}),
            template_str=CARD,
            settings=self.settings,
            millions=sum(parameter.numel() for parameter in self.parameters()) / 1e6,
            tables=tables,
            **kwargs,
        )
        return ModelCard(card.content.encode(errors="backslashreplace").decode())  # names that are not UTF-8
