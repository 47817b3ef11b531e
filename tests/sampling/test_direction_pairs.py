from dataclasses import replace
from pkgutil import resolve_name

import numpy as np
import pytest
import torch

from sagl.diffusion.predictor import Condition, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.models.direction_head import NUM_LEVELS
from sagl.sampling.direction_pairs import DirectionPairs, to_float16
from sagl.sampling.pipeline import build_pipeline
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.direction_head import DirectionHeadOptions
from sagl.settings.guidance import Autoguidance, PerturbedAttentionGuidance, SelfAttentionGuidance
from sagl.settings.sampling import SamplerSettings
from tests.guidance.test_dino import dino_file
from tests.helpers.heads import SAG
from tests.helpers.networks import count_calls, grey_unet, write_grey_unet
from tests.helpers.predictors import Recorder, guidances_of

NETWORK = grey_unet(channel_mult=(1, 2), attention_resolutions=(8, 4))
OPTIONS = DirectionHeadOptions(num_groups=3, group_size=2, num_steps=(3, 5), num_validation_groups=1, null_fraction=1.0)


def source(network=NETWORK, guidance=SAG, num_timesteps=1000, **changes):
    diffusion = DiffusionSettings(num_timesteps=num_timesteps)
    pipeline = build_pipeline(network, diffusion, SamplerSettings(respacing="2"))
    return DirectionPairs(pipeline=pipeline, guidance=guidance, options=replace(OPTIONS, **changes), seed=0)


def test_a_pair_is_the_difference_of_both_predictions_for_an_x_t_of_a_guided_chain():
    pairs = source().training_round(0)
    schedule = make_schedule(DiffusionSettings())
    predict = make_predictor(NETWORK, schedule, "learned_range")
    (guidance,) = guidances_of(
        schedule, network=NETWORK, sag={"scale": 1.0, "site": "output.0", "blur_sigma": 1.0}
    ).values()
    for row in range(0, len(pairs.timesteps), 5):
        x_t, step = pairs.images[row : row + 1, :1], int(pairs.timesteps[row])
        with torch.no_grad():
            condition = replace(guidance.prepare_condition(Condition()), features=True, block_inputs=("output.1",))
            base = predict(x_t, step, condition)
            term = guidance.term(predict, x_t, step, Condition(), base)
        torch.testing.assert_close(pairs.direction[row : row + 1], term.eps, rtol=1e-3, atol=1e-4)
        coarse, fine = (feature_map[row : row + 1].float() for feature_map in pairs.maps)
        torch.testing.assert_close(coarse, base.block_inputs["output.1"], rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(fine, base.features, rtol=1e-3, atol=1e-2)


def test_chains_without_scale_are_those_of_unguided_sampling_and_others_are_not():
    chains = {"samplers": ("ddim",), "num_steps": (4, 4), "num_groups": 1}
    plain = source(scales=(0.0, 0.0), **chains).training_round(0).images[:, :1]
    guided = source(scales=(1.0, 1.0), **chains).training_round(0).images[:, :1]
    assert torch.equal(guided[:2], plain[:2])
    assert not torch.allclose(guided[2:], plain[2:])


def test_every_step_of_a_round_costs_two_evaluations_of_a_group():
    network = grey_unet()
    calls = count_calls(network)
    pairs = source(network).training_round(0)
    assert len(calls) == 2 * len(pairs.timesteps) / OPTIONS.group_size


def test_a_round_depends_on_its_number_alone_and_ranks_share_its_groups():
    whole = source().training_round(1)
    parts = [source().training_round(1, rank, 2) for rank in range(2)]
    assert sum(len(part.timesteps) for part in parts) == len(whole.timesteps)
    assert torch.equal(parts[0].images[: OPTIONS.group_size], whole.images[: OPTIONS.group_size])
    others = source().training_round(2), source().validation_pairs()
    assert all(not torch.equal(other.images[:2, :1], whole.images[:2, :1]) for other in others)


@pytest.mark.parametrize("guidance", [SAG, PerturbedAttentionGuidance()])
def test_sizes_are_measured_by_timestep(guidance):
    levels = source(guidance=guidance).levels()
    assert levels.shape == (3 if guidance is SAG else 2, NUM_LEVELS)
    assert (levels > 0).all()
    assert levels[1, 0] > levels[1, -1]  # the high-pass in units of eps grows as the noise falls


@pytest.mark.parametrize("num_timesteps", [21, 50])
def test_sizes_of_a_short_process_are_interpolated_between_its_timesteps(num_timesteps):
    levels = source(num_timesteps=num_timesteps).levels()
    chains = {"samplers": ("ddpm",), "num_steps": (num_timesteps, num_timesteps), "num_groups": 1}
    pairs = source(num_timesteps=num_timesteps, **chains).training_round(0)
    parts = [pairs.direction, pairs.images[:, 2:3], pairs.images[:, 3:4]]  # the last two: high-pass, and masked
    for level, part in zip(levels, parts, strict=True):
        rms = [float(part[pairs.timesteps == t].square().mean().sqrt()) for t in range(num_timesteps)]
        positions = np.linspace(0, num_timesteps - 1, NUM_LEVELS)
        np.testing.assert_allclose(level, np.interp(positions, range(num_timesteps), rms), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("null_label", [True, False])
def test_chains_are_without_label_only_if_the_weaker_network_has_a_null_label(null_label, tmp_path):
    weaker = write_grey_unet(tmp_path / "weak.safetensors", null_label=null_label)
    network = grey_unet()
    calls = count_calls(network)
    pairs = source(network, Autoguidance(checkpoint=str(weaker)), null_fraction=1.0).training_round(0)
    labels = torch.cat([args[2] for args in calls])
    assert pairs.direction.isfinite().all()
    assert set((labels == network.settings.num_classes).tolist()) == {null_label}


def weaker_network(folder):
    return Autoguidance(checkpoint=str(write_grey_unet(folder / "weak.safetensors", num_channels=64)))


def dino_mask(folder):
    return replace(SAG, mask="dino", dino_checkpoint=dino_file(folder))


@pytest.mark.parametrize(
    ("guidance_in", "loader"),
    [(weaker_network, "sagl.sampling.pipeline.load"), (dino_mask, "sagl.guidance.dino.load_dino")],
)
def test_a_file_of_the_method_is_loaded_once_for_all_groups_and_rounds(guidance_in, loader, tmp_path, monkeypatch):
    guidance, loads = guidance_in(tmp_path), Recorder(resolve_name(loader))
    monkeypatch.setattr(loader, loads)
    fresh = source(guidance=guidance).training_round(1)
    loads.calls.clear()
    pairs = source(guidance=guidance)
    assert pairs.has_mask == isinstance(guidance, SelfAttentionGuidance)
    pairs.levels()
    pairs.validation_pairs()
    pairs.training_round(0)
    again = pairs.training_round(1)
    assert len(loads.calls) == 1
    assert torch.equal(again.direction, fresh.direction)
    assert torch.equal(again.images, fresh.images)


def test_a_weaker_network_moves_with_the_network_that_it_guides(tmp_path):
    pairs = source(grey_unet(), weaker_network(tmp_path))
    assert not pairs.has_mask
    pairs.to(torch.device("meta"))
    (weak_network,) = pairs.weak_networks.values()
    assert {p.device.type for n in (weak_network, pairs.pipeline.network) for p in n.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_beyond_the_range_of_float16_stay_finite(dtype):
    stored = to_float16(torch.tensor([-1e6, -2.5, 0.0, 2.5, 1e6], dtype=dtype))
    assert stored.tolist() == [-65504.0, -2.5, 0.0, 2.5, 65504.0]
