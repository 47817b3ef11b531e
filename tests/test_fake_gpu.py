"""What a GPU is given to do, counted on fake CUDA tensors and on the meta device."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from torchmetrics.image.fid import _compute_fid

from sagl.diffusion.schedule import make_schedule
from sagl.guidance.perturbed_attention import attend_to_self
from sagl.guidance.registry import GUIDANCES
from sagl.guidance.smoothed_energy import attend_with_blurred_queries
from sagl.guidance.token_perturbation import attend_to_shuffled
from sagl.metrics.feature_metrics import FeatureMetrics
from sagl.metrics.features import Features
from sagl.models import normalization
from sagl.models.adm import UNet
from sagl.models.cpu_kernels import optimize_for_cpu
from sagl.models.direction_head import DirectionHead
from sagl.models.memory import MemoryTracker
from sagl.models.zoo import RELEASED
from sagl.modules.diffusion_module import DiffusionModule
from sagl.sampling.pipeline import build_pipeline
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import ClassifierFreeGuidance, SelfAttentionGuidance
from sagl.settings.network import HeadSettings, UNetSettings
from sagl.settings.sampling import SamplerSettings
from sagl.settings.training import DiffusionTrainingSettings
from sagl.shapes import AttentionSite
from sagl.utils.files import packaged_configs
from tests.helpers.fake_cuda import DispatchCounter, fake_cuda, on_fake_cuda
from tests.helpers.heads import SHAPE
from tests.helpers.networks import COLOUR, GREY, count_calls
from tests.helpers.training import with_stub_trainer

SAG = {"sag": SelfAttentionGuidance(scale=0.3, site="output.1")}


def methods(*names):
    """Settings of guidance methods with their defaults."""
    return {name: GUIDANCES[name].settings_class(scale=0.3) for name in names}


CFG_AND_SAG = {"cfg": ClassifierFreeGuidance(scale=1.0), **SAG}
UNCONDITIONAL = UNetSettings(**GREY | {"num_classes": None, "null_label": False})
OTHER_CONFIGS = ("lsun_horse", "imagenet128", "imagenet256_cond", "imagenet256_uncond")
LSUN = RELEASED["lsun_cat"].settings


def meta_unet(settings):
    with torch.device("meta"):
        return UNet(settings)


def guided_step(sampler, guidances):
    """Count what the third step of a trajectory dispatches."""
    network = meta_unet(UNetSettings(**COLOUR)).eval().requires_grad_(False)
    with fake_cuda(), torch.inference_mode():
        settings = SamplerSettings(sampler=sampler, respacing="10", eta=0.0)
        pipeline = build_pipeline(on_fake_cuda(network), DiffusionSettings(), settings, guidances)
        steps = pipeline.sample_progressive(0, range(4), torch.zeros(4, dtype=torch.int64))
        next(steps), next(steps)  # the first ones also fill caches
        with DispatchCounter() as counter:
            _, x, _ = next(steps)
        assert x.device.type == "cuda"
    return counter


@pytest.mark.parametrize(
    ("sampler", "guidances", "copies"),
    [
        *(("ddpm", guidances, 1) for guidances in ({}, SAG, CFG_AND_SAG)),
        *((sampler, SAG, 0) for sampler in ("ddim", "dpm++2m", "heun", "unipc")),
        ("ddim", CFG_AND_SAG, 0),
        ("ddim", methods("blur", "pag", "seg", "history", "eps_scaling"), 0),
        ("ddim", methods("tpg", "tsg"), 2),  # the permutations, and the noise of the embedding
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else str(value),
)
def test_the_noise_is_all_that_a_step_copies_to_the_gpu_and_nothing_comes_back(sampler, guidances, copies):
    counter = guided_step(sampler, guidances)
    assert (counter.to_gpu, counter.to_cpu) == (copies, 0)


def test_a_step_with_a_direction_head_copies_its_noise_alone(monkeypatch):
    shape = HeadSettings(
        method="sag",
        network_rms=(1.0,),
        **SHAPE | {"in_channels": 3, "map_channels": UNetSettings(**COLOUR).map_channels},
    )
    with torch.device("meta"):
        head = DirectionHead(shape).requires_grad_(False)
    monkeypatch.setattr("sagl.sampling.pipeline.load_head", lambda *_: on_fake_cuda(head))
    calls = count_calls(head)
    counter = guided_step("ddpm", {"sag": replace(SAG["sag"], direction_head="auto")})
    assert (counter.to_gpu, counter.to_cpu) == (1, 0)
    assert len(calls) == 3


def test_metrics_of_previews_are_computed_on_the_device():
    """The meta device has no data: a step that goes through NumPy or the CPU would fail."""
    device, images = torch.device("meta"), torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    metrics = FeatureMetrics(lambda x: Features(torch.zeros(len(x), 8)), images[:1], device)
    metrics.update_real(images)
    total, products, _ = metrics.real_state.values()
    distance = _compute_fid(total, products, total, products)
    assert (total.device, products.device, distance.device) == (device, device, device)


def test_a_batch_of_training_copies_its_noise_timesteps_weights_and_dropped_labels_and_no_tables():
    settings = DiffusionTrainingSettings(network=UNetSettings(**GREY), label_dropout=0.5)
    with torch.device("meta"):
        module = with_stub_trainer(DiffusionModule(settings), weights_seed=None)
    module.schedule = make_schedule(DiffusionSettings())
    module._log_if_finite = lambda values: True
    with fake_cuda(), torch.no_grad():
        on_fake_cuda(module.network)
        batch = (
            torch.zeros(4, 1, 8, 8, dtype=torch.uint8, device="cuda"),
            torch.zeros(4, dtype=torch.int64, device="cuda"),
        )
        module.training_step(batch, 0)  # fills the caches of tables
        with DispatchCounter() as counter:
            module.training_step(batch, 1)
    assert (counter.to_gpu, counter.to_cpu) == (4, 0)


def lsun_pass(batch):
    network = meta_unet(LSUN).eval().requires_grad_(False).bfloat16()
    with fake_cuda():
        on_fake_cuda(network)
        with torch.device("cuda"):
            x, timesteps = torch.zeros(batch, 3, 256, 256), torch.zeros(batch, dtype=torch.int64)
        with torch.inference_mode(), DispatchCounter() as counter:
            network(x, timesteps)
    return counter.total


def test_a_pass_of_the_lsun_network_dispatches_as_much_for_any_batch():
    assert lsun_pass(8) == lsun_pass(64) <= 3000


def graphs(batch, sites):
    """Compile a network on the meta device, and return the number of nodes of each of its graphs."""
    nodes = []

    def count(graph, inputs):
        nodes.append(len(graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    network = optimize_for_cpu(meta_unet(UNCONDITIONAL)).eval().requires_grad_(False)
    compiled = torch.compile(network, backend=count, dynamic=False)
    with torch.device("meta"), torch.inference_mode():
        compiled(torch.zeros(batch, 1, 8, 8), torch.zeros(batch, dtype=torch.int64), attention_sites=sites)
    return nodes


@pytest.mark.slow
@pytest.mark.parametrize("sites", [(), (AttentionSite("output.1"),)], ids=["plain", "attention"])
def test_a_network_compiles_as_one_graph_of_a_size_that_no_batch_changes(sites, monkeypatch):
    monkeypatch.setattr(normalization, "_is_on_gpu", lambda x: True)
    sizes = [graphs(batch, sites) for batch in (2, 8, 32)]
    assert len(sizes[0]) == 1
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.slow
def test_a_compiled_network_is_not_compiled_again_for_other_random_numbers_of_guidance():
    nodes = []

    def count(graph, inputs):
        nodes.append(len(graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(meta_unet(UNCONDITIONAL).eval().requires_grad_(False), backend=count, dynamic=False)
    blurred = partial(attend_with_blurred_queries, 1.0)
    with torch.device("meta"), torch.inference_mode():
        x, timesteps = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
        for _ in range(3):
            shuffled = partial(attend_to_shuffled, torch.zeros(2, 64, dtype=torch.int64))
            edits = (("middle", shuffled), ("output.0", attend_to_self), ("output.1", blurred))
            compiled(x, timesteps, attention_edits=edits, timestep_noise=torch.zeros(2, 128))
    assert len(nodes) == 1


# -------------------------------------------------------------------------------------------- training memory


def training_bytes(settings, batch, monkeypatch):
    """Peak of forward and backward in bf16-mixed on a GPU, without the weights and their gradients."""
    monkeypatch.setattr(normalization, "_is_on_gpu", lambda x: True)
    network = meta_unet(settings).bfloat16()
    with torch.device("meta"):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        x = torch.zeros(batch, settings.in_channels, settings.image_size, settings.image_size)
        labels = None if settings.num_classes is None else torch.zeros(batch, dtype=torch.int64)
        with MemoryTracker() as tracker:
            network(x, torch.zeros(batch, dtype=torch.int64), labels).out.float().square().mean().backward()
    return tracker.peak


def state_bytes(settings):
    """Weights, two moments, average, gradients and DDP's buckets in float32, and weights cast to 16 bits."""
    return (6 * 4 + 2) * sum(p.numel() for p in meta_unet(settings).parameters())


@pytest.mark.parametrize("name", ["lsun_cat", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_CONFIGS)])
def test_a_packaged_config_trains_in_24_gb(name, monkeypatch):
    config = yaml.safe_load((packaged_configs() / f"{name}.yaml").read_text())
    settings = replace(RELEASED[name].settings, use_checkpoint=config["model"]["use_checkpoint"])
    batch_size = config["data"]["init_args"]["batch_size"]
    assert batch_size == 8
    assert state_bytes(settings) + training_bytes(settings, batch_size, monkeypatch) < 0.9 * 24e9


def test_features_keep_the_data_type_of_autocast_through_normalisation():
    for size in (4, 256):
        with fake_cuda(torch.bfloat16):
            x = torch.zeros(1, 64, size, size, dtype=torch.bfloat16, device="cuda")
            weight, scale = torch.zeros(64, device="cuda"), torch.zeros(1, 64, dtype=torch.bfloat16, device="cuda")
            out = normalization.ada_group_norm(x, weight, weight, scale, scale, eps=1e-5)
        assert out.dtype == torch.bfloat16
