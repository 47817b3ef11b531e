import pytest
import torch

from sagl.guidance.registry import GUIDANCES
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.direction_head import DirectionHeadOptions, HeadTrainingSettings
from sagl.training.direction_head import build_head_module
from tests.helpers.errors import refused
from tests.helpers.heads import SAG
from tests.helpers.networks import write_grey_unet


def build(checkpoint, **options):
    guidances = {name: entry.settings_class() for name, entry in GUIDANCES.items()} | {"sag": SAG}
    settings = HeadTrainingSettings(direction_head=DirectionHeadOptions(**options))
    return build_head_module(settings, guidances, str(checkpoint), "ema")


@pytest.mark.parametrize("method", ["", "foo", "trainer", "history"])
def test_a_name_that_is_no_method_with_a_weak_prediction_is_refused(method):
    with refused("`model.direction_head.method`", repr(method)):
        build("absent.safetensors", method=method)


def test_chains_have_at_most_the_steps_of_the_process(tmp_path):
    network = write_grey_unet(tmp_path / "net.safetensors")
    with refused("`direction_head.num_steps`", "1000", "1001"):
        build(network, num_steps=(1, 1001))
    assert build(network, num_steps=(1, 1000)).source.options.num_steps == (1, 1000)


@pytest.mark.parametrize("num_timesteps", [21, 100])
def test_a_head_is_trained_for_a_process_of_any_length(num_timesteps, tmp_path):
    network = write_grey_unet(tmp_path / "net.safetensors", diffusion=DiffusionSettings(num_timesteps=num_timesteps))
    with refused("`direction_head.num_steps`", num_timesteps, num_timesteps + 1):
        build(network, num_steps=(1, num_timesteps + 1))
    module = build(network, num_steps=(2, 3), num_groups=1, group_size=1)
    assert module.network.settings.num_timesteps == num_timesteps
    module.network.levels.data.copy_(module.source.levels())
    pairs = module.source.training_round(0)
    with torch.no_grad():
        assert module.network(pairs.images, pairs.maps, pairs.timesteps).isfinite().all()
