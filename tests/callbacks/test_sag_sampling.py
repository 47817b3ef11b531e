from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from sagl.callbacks.ema import EMA
from sagl.callbacks.sag_sampling import SAGPreviews, log_image, preview_metrics
from sagl.errors import UserError
from sagl.metrics.extractors import EXTRACTORS
from sagl.metrics.features import Features
from sagl.metrics.frechet import frechet_distance, statistics
from sagl.modules.diffusion_module import DiffusionModule
from sagl.sampling.exports import colorize_masks
from sagl.sampling.pipeline import build_pipeline, make_labels
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.network import UNetSettings
from sagl.settings.sampling import RunSettings, SamplerSettings
from sagl.settings.training import (
    CheckpointSettings,
    DiffusionTrainingSettings,
    OptimizerSettings,
    PreviewSettings,
)
from sagl.utils.images import image_grid, to_uint8
from tests.helpers.extractors import USER_EXTRACTOR
from tests.helpers.files import read_png
from tests.helpers.networks import GREY, draw_weights
from tests.helpers.training import IGNORED_WARNINGS, trainer

pytestmark = IGNORED_WARNINGS

SAG = SelfAttentionGuidance(site="output.0", blur_sigma=1.0)
IMAGES = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


class Extractor:
    """Twelve features that need no network, and three classes; counts the images."""

    num_images = 0

    def __call__(self, images):
        Extractor.num_images += len(images)
        features = images.float().flatten(1)[:, :36].unflatten(1, (12, 3)).sum(dim=2)
        return Features(features, logits=features[:, :3] / 50)


@pytest.fixture(autouse=True)
def extractor(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setitem(EXTRACTORS, "effnet_lite0_64", lambda device: Extractor())


def build_module(learning_rate=1e-12):
    optimizer = OptimizerSettings(learning_rate=learning_rate)
    module = DiffusionModule(DiffusionTrainingSettings(network=UNetSettings(**GREY), optimizer=optimizer))
    draw_weights(module.network, 1).train()
    return module


def fit(module, callbacks, steps=4, **options):
    validation = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1}
    run = trainer(callbacks=callbacks, max_steps=steps, **validation, **options)
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    run.fit(module, loader, loader)
    return run


def preview(folder, sag=SAG, **settings):
    defaults = {"respacing": "3", "num_samples": 5, "batch_size": 2}
    return SAGPreviews(folder, PreviewSettings(**{**defaults, **settings}), sag)


def sample(module, ids, scale, labels="balanced"):
    sag = SelfAttentionGuidance(site="output.0", blur_sigma=1.0, scale=scale)
    sampler, network = SamplerSettings(sampler="ddim", respacing="3"), module.network.eval()
    pipeline = build_pipeline(network, module.diffusion_settings, sampler, {"sag": sag})
    with torch.inference_mode():
        labels = make_labels(RunSettings(num_samples=len(ids), labels=labels), ids, network)
        x, mask_frequency = pipeline.sample(0, ids, labels)
    return to_uint8(x), mask_frequency


# --------------------------------------------------------------------------------------------------------- grids


def test_every_validation_writes_a_grid_of_the_same_samples_with_masks_under_guided_rows(tmp_path):
    module, ids = build_module(), list(range(5))
    fit(module, [preview(tmp_path, scales=(0.0, 0.5, 2.0))])
    files = sorted((tmp_path / "previews").iterdir())
    assert [path.name for path in files] == ["step_00000002.png", "step_00000004.png"]
    rows = [sample(module, ids, 0.0)[0]]
    for scale in (0.5, 2.0):
        images, mask_frequency = sample(module, ids, scale)
        rows += [images, colorize_masks(mask_frequency)]
    expected = image_grid(rows).permute(1, 2, 0).numpy()
    first, second = (read_png(path) for path in files)
    assert second.shape == expected.shape
    assert abs(second.astype(int) - expected).mean() < 1  # sampled two at a time here, and five at a time there
    assert (rows[1] != rows[0]).any()
    assert (first == second).mean() > 0.99


class UnlabelledData(LightningDataModule):
    """The images without labels."""

    has_labels = False

    def train_dataloader(self):
        return DataLoader(TensorDataset(IMAGES, torch.full_like(LABELS, -1)), batch_size=4)

    val_dataloader = train_dataloader


def test_previews_of_a_training_without_labels_have_the_null_label_that_it_trains(tmp_path):
    module = build_module()
    callbacks = [preview(tmp_path, scales=(0.0,))]
    validation = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    trainer(callbacks=callbacks, max_steps=2, **validation).fit(module, datamodule=UnlabelledData())
    (path,) = (tmp_path / "previews").iterdir()
    expected = {name: image_grid([sample(module, range(5), 0.0, name)[0]]) for name in ("null", "balanced")}
    assert (read_png(path) == expected["null"].permute(1, 2, 0).numpy()).all()
    assert not torch.equal(expected["null"], expected["balanced"])


def test_the_ema_weights_are_sampled(tmp_path):
    weights = []

    class Recorder(SAGPreviews):
        def _log_grid(self, trainer, pipelines):
            weights.append(pipelines[0.0].network.out[2].weight.clone())

    ema, module = EMA(CheckpointSettings(ema_decay=0.9)), build_module(learning_rate=1e-2)
    fit(module, [Recorder(tmp_path, PreviewSettings(respacing="3"), SAG), ema])
    assert torch.equal(weights[-1], ema._average_model.module.network.out[2].weight)
    assert not torch.equal(weights[-1], module.network.out[2].weight)


def test_without_samples_nothing_is_written(tmp_path):
    fit(build_module(), [preview(tmp_path, num_samples=0)])
    assert list(tmp_path.iterdir()) == []


def test_the_cost_of_a_validation_is_printed_before_the_first_step(tmp_path, capsys):
    fit(build_module(), [preview(tmp_path, num_samples=5, scales=(0.0, 0.5))], steps=1)
    assert "45 network evaluations" in capsys.readouterr().out  # 5 · (3 + 6)


def test_a_logger_with_log_image_gets_the_grid_and_others_nothing():
    calls = []
    logger = SimpleNamespace(log_image=lambda **arguments: calls.append(arguments))
    log_image(logger, "preview", torch.zeros(3, 4, 6, dtype=torch.uint8), 7)
    log_image(SimpleNamespace(), "preview", torch.zeros(3, 4, 6, dtype=torch.uint8), 7)
    (arguments,) = calls
    assert (arguments["key"], arguments["step"], arguments["images"][0].shape) == ("preview", 7, (4, 6, 3))


# ------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_extractors_compute_in_float32_whatever_the_trainer_s_precision(precision, tmp_path, monkeypatch):
    seen = set()

    def build(device):
        seen.add(torch.get_default_dtype())
        weight = torch.ones(64, 12)

        def extract(images):
            features = images.float().flatten(1) @ weight
            seen.add(features.dtype)
            return features

        return extract

    monkeypatch.setitem(EXTRACTORS, "effnet_lite0_64", build)
    callbacks = [preview(tmp_path, num_samples=0, num_metric_samples=2, scales=(0.0,)), EMA(CheckpointSettings())]
    fit(build_module(), callbacks, steps=2, precision=precision)
    assert seen == {torch.float32}


def test_the_metrics_of_each_scale_are_those_of_its_images(tmp_path):
    module, extract = build_module(), Extractor()
    run = fit(module, [preview(tmp_path, num_samples=0, num_metric_samples=7, scales=(0.0, 0.5))])
    assert not (tmp_path / "previews").exists()
    for scale in (0.0, 0.5):
        images = torch.cat([sample(module, [i], scale)[0] for i in range(7)])
        pair = (statistics(extract(x).pooled) for x in (IMAGES, images))
        value = float(run.callback_metrics[f"val/frechet_{scale:g}"])
        assert value == pytest.approx(frechet_distance(*pair), rel=0.02)
        assert 1 <= float(run.callback_metrics[f"val/inception_score_{scale:g}"]) <= 3


def test_real_images_are_processed_once_for_all_runs_and_others_again():
    def compute(real=IMAGES):
        Extractor.num_images = 0
        metrics = preview_metrics("effnet_lite0_64", real.split(5), torch.device("cpu"))
        return Extractor.num_images, metrics.compute(IMAGES.flip(2).split(4))

    first = compute()
    assert first[0] == 1 + len(IMAGES)  # one for the number of features
    assert compute() == (1, first[1])
    assert compute(real=IMAGES.flip(0)[1:])[1] != first[1]


@pytest.mark.parametrize("name", ["inception", USER_EXTRACTOR])
def test_real_images_are_processed_again_for_other_weights_or_code_of_the_extractor(name, monkeypatch):
    class Scaled(Extractor):
        def __init__(self, scale, version):
            self.scale, self.version = scale, version

        def __call__(self, images):
            return super().__call__(images).map(lambda part: self.scale * part)

    def compute(extract):
        monkeypatch.setitem(EXTRACTORS, "inception", lambda device: extract)
        monkeypatch.setattr("tests.helpers.extractors.user_extractor", lambda device: extract)
        Extractor.num_images = 0
        metrics = preview_metrics(name, IMAGES.split(5), torch.device("cpu"))
        return metrics.compute(IMAGES.flip(2).split(4))["frechet"], Extractor.num_images

    has_version = name == "inception"  # the code of the user's may change without one
    first, second, third = (compute(Scaled(scale, "ab"[scale - 1] * has_version)) for scale in (1, 2, 2))
    assert second[0] == pytest.approx(4 * first[0], rel=1e-3) == third[0]
    assert (third[1] < second[1]) == has_version


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_site_that_the_network_lacks_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="site"):
        fit(build_module(), [preview(tmp_path, SelfAttentionGuidance(site="input.0"))])


def test_previews_are_unguided_if_the_network_lacks_the_default_site(tmp_path):
    fit(build_module(), [preview(tmp_path, SelfAttentionGuidance(), scales=(0.0, 0.5))], steps=2)
    (path,) = (tmp_path / "previews").iterdir()
    assert read_png(path).shape == image_grid([IMAGES[:5]]).permute(1, 2, 0).shape


@pytest.mark.parametrize(
    ("settings", "num_lines"),
    [({}, 0), ({"num_samples": 0}, 0), ({"num_samples": 8}, 1), ({"num_metric_samples": 4}, 1)],
)
def test_that_there_are_no_previews_without_validation_is_said_if_their_number_is_set(
    settings, num_lines, tmp_path, capsys
):
    fit(build_module(), [SAGPreviews(tmp_path, PreviewSettings(**settings), SAG)], steps=1, limit_val_batches=0)
    assert capsys.readouterr().out.count("No previews: ") == num_lines


@pytest.mark.parametrize(
    ("sag", "validation", "names"),
    [
        (SelfAttentionGuidance(), {}, ["sag.site", "output.2"]),
        (SAG, {"limit_val_batches": 0}, ["preview.keep_best", "data.num_validation"]),
    ],
)
def test_best_checkpoints_whose_distance_would_never_be_logged_are_refused_before_the_first_step(
    sag, validation, names, tmp_path
):
    """The network lacks the default site, so that previews would be unguided; or there is no validation."""
    settings = {"scales": (0.0, 0.5), "num_metric_samples": 4, "keep_best": 1, "best_scale": 0.5}
    module = build_module()
    with pytest.raises(UserError) as error:
        fit(module, [preview(tmp_path, sag, **settings)], steps=2, **validation)
    assert all(name in str(error.value) for name in names)
    assert module.trainer.global_step == 0
