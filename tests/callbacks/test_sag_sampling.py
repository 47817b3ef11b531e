from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sagl.callbacks import sag_sampling
from sagl.callbacks.ema import EMA
from sagl.callbacks.sag_sampling import SAGSampling
from sagl.errors import UserError
from sagl.metrics.extractors import EXTRACTORS
from sagl.metrics.frechet import frechet_distance, statistics
from sagl.modules.diffusion_module import DiffusionModule
from sagl.sampling.grid import colorize_masks, image_grid
from sagl.sampling.pipeline import build_pipeline, make_labels, run_to_end
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.network import UNetSettings
from sagl.settings.sampling import RunSettings, SamplerSettings
from sagl.settings.training import CheckpointSettings, OptimizerSettings, PreviewSettings
from sagl.utils.images import to_uint8
from tests.helpers.reference import draw_weights
from tests.helpers.tiny import GREY, QUIET, read_png, trainer

pytestmark = QUIET

SAG = SelfAttentionGuidance(site="output.0", blur_sigma=1.0)
IMAGES = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


def loader():
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)


def module_of(rate=1e-12):
    module = DiffusionModule(UNetSettings(**GREY), optimizer=OptimizerSettings(learning_rate=rate))
    draw_weights(module.network, 1).train()
    return module


def fit(module, callbacks, steps=4):
    run = trainer(
        callbacks=callbacks, max_steps=steps, val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=1
    )
    run.fit(module, loader(), loader())
    return run


def preview(folder, **settings):
    return SAGSampling(
        folder, PreviewSettings(**{"respacing": "3", "num_samples": 5, "batch_size": 2, **settings}), SAG
    )


def made(network, ids, scale):
    recipe = build_pipeline(
        network,
        DiffusionModule(network.settings).diffusion_settings,
        SamplerSettings(sampler="ddim", respacing="3"),
        {"sag": SelfAttentionGuidance(site="output.0", blur_sigma=1.0, scale=scale)},
    )
    run = RunSettings(num_samples=len(ids), labels="balanced")
    with torch.inference_mode():
        x, share = run_to_end(recipe.sample_progressive(0, ids, make_labels(run, ids, network)))
    return to_uint8(x), share


def test_a_grid_a_validation_unguided_and_each_scale_over_its_masks(tmp_path):
    module = module_of()
    fit(module, [preview(tmp_path, scales=(0.0, 0.5, 2.0))])
    assert [path.name for path in sorted((tmp_path / "previews").iterdir())] == [
        "step_00000002.png",
        "step_00000004.png",
    ]
    network = module.network.eval()
    rows = [made(network, list(range(5)), 0.0)[0]]
    for scale in (0.5, 2.0):
        images, share = made(network, list(range(5)), scale)
        rows += [images, colorize_masks(share)]
    want = image_grid(rows).permute(1, 2, 0).numpy()
    got = read_png(tmp_path / "previews" / "step_00000004.png")
    assert got.shape == want.shape
    assert abs(got.astype(int) - want).mean() < 1  # drawn two at a time here, and five at a time there
    assert (rows[1] != rows[0]).any()


def test_the_same_ids_are_drawn_every_time(tmp_path):
    fit(module_of(), [preview(tmp_path)])
    first, second = (read_png(path) for path in sorted((tmp_path / "previews").iterdir()))
    assert (first == second).mean() > 0.99


def test_the_averages_are_what_is_drawn(tmp_path):
    networks = []

    class Peeping(SAGSampling):
        def _draw(self, trainer, recipes):
            networks.append(recipes[0][1].network.out[2].weight.clone())

    average = EMA(CheckpointSettings(ema_decay=0.9))
    module = module_of(rate=1e-2)
    fit(module, [Peeping(tmp_path, PreviewSettings(respacing="3"), SAG), average])
    held = average._average_model.module.network.out[2].weight
    assert torch.equal(networks[-1], held)
    assert not torch.equal(networks[-1], module.network.out[2].weight)


@pytest.fixture
def plain_features(monkeypatch):
    """Features that need no network: sums of a few pixels."""

    def extract(images):
        return images.float().flatten(1)[:, :12].unflatten(1, (4, 3)).sum(dim=2)

    monkeypatch.setitem(EXTRACTORS, "effnet_lite0_64", lambda device: extract)
    return extract


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_the_distance_of_each_scale_is_that_of_its_images_from_the_validation_images(tmp_path, plain_features):
    module = module_of()
    callback = preview(tmp_path, num_samples=0, num_metric_samples=7, scales=(0.0, 0.5))
    run = fit(module, [callback])
    assert not (tmp_path / "previews").exists()
    for scale in (0.0, 0.5):
        images = torch.cat([made(module.network.eval(), [i], scale)[0] for i in range(7)])
        want = frechet_distance(statistics(plain_features(IMAGES)), statistics(plain_features(images)))
        assert float(run.callback_metrics[f"val/frechet_{scale:g}"]) == pytest.approx(want, rel=0.02)


def test_what_validations_will_cost_is_said_before_the_first_step(tmp_path, capsys):
    fit(module_of(), [preview(tmp_path, num_samples=5, scales=(0.0, 0.5))], steps=1)
    said = capsys.readouterr().out
    assert "5 images drawn and 0 measured at scales 0 0.5: 45 network evaluations, about " in said  # 5 · (3 + 6)


def test_a_logger_that_takes_pictures_gets_the_grid(tmp_path):
    shown = []
    logger = SimpleNamespace(log_image=lambda **told: shown.append(told))
    sag_sampling._show(logger, "preview", torch.zeros(3, 4, 6, dtype=torch.uint8), 7)
    (told,) = shown
    assert (told["key"], told["step"], told["images"][0].shape) == ("preview", 7, (4, 6, 3))
    sag_sampling._show(SimpleNamespace(), "preview", torch.zeros(3, 4, 6, dtype=torch.uint8), 7)


def test_scales_that_the_network_cannot_have_are_refused_before_the_first_step(tmp_path):
    callback = SAGSampling(tmp_path, PreviewSettings(respacing="3"), SelfAttentionGuidance(site="input.0"))
    with pytest.raises(UserError, match="site"):
        fit(module_of(), [callback])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_samples": -1}, "preview.num_samples"),
        ({"num_metric_samples": 1}, "preview.num_metric_samples"),
        ({"batch_size": 0}, "preview.batch_size"),
        ({"scales": ()}, "preview.scales"),
        ({"keep_best": 2}, "preview.num_metric_samples"),
        ({"keep_best": 2, "num_metric_samples": 9, "best_scale": 0.2}, "preview.best_scale"),
        ({"sampler": "euler"}, "sampler"),
        ({"max_checkpoint_gb": 0.0}, "preview.max_checkpoint_gb"),
    ],
)
def test_previews_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        PreviewSettings(**settings)


def test_no_previews_are_drawn_where_none_are_asked_for(tmp_path):
    fit(module_of(), [preview(tmp_path, num_samples=0)])
    assert list(tmp_path.iterdir()) == []
