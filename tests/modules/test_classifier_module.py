import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sagl.errors import UserError
from sagl.models.zoo import RELEASED
from sagl.modules.classifier_module import ClassifierModule
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import ClassifierSettings
from sagl.settings.training import OptimizerSettings
from tests.helpers.reference import draw_weights
from tests.helpers.tiny import GREY_CLASSIFIER, QUIET, trainer

pytestmark = QUIET

CLASSES = GREY_CLASSIFIER["num_classes"]
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.arange(8) % CLASSES


def module_of(*, batch=0, rank=0, ranks=1, changes=None, **options):
    """A module with drawn weights, told its batch and rank without a trainer; what it logs is in `logged`."""
    module = ClassifierModule(ClassifierSettings(**{**GREY_CLASSIFIER, **(changes or {})}), **options)
    draw_weights(module.network, 1)
    optimizers = [SimpleNamespace(param_groups=[{"lr": 1.0}])]
    loop = SimpleNamespace(total_batch_idx=batch)
    told = {"global_rank": rank, "world_size": ranks, "optimizers": optimizers, "state": SimpleNamespace(fn="fit")}
    module.trainer = SimpleNamespace(fit_loop=loop, **told)
    module.trainer.strategy = SimpleNamespace(reduce=lambda values, reduce_op: values)
    module.logged = {}
    module.log = lambda name, value, **_: module.logged.update({name: float(torch.as_tensor(value).detach())})
    module.log_dict = lambda values: [module.log(name, value) for name, value in values.items()]
    return module


def loss_of(module, labels=LABELS):
    with torch.no_grad():
        return float(module.training_step((IMAGES, labels), 0))


# -------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("other", [{"seed": 4}, {"batch": 11}, {"rank": 0}])
def test_the_loss_of_a_step_depends_on_seed_batch_and_rank(other):
    told = {"seed": 3, "batch": 10, "rank": 1, "ranks": 2}
    torch.manual_seed(1)
    first = loss_of(module_of(**told))
    torch.manual_seed(2)
    assert loss_of(module_of(**told)) == first
    assert loss_of(module_of(**{**told, **other})) != first


def test_timesteps_are_drawn_uniformly_over_the_whole_process():
    drawn = module_of()._drawn(torch.zeros(4000, 1, 2, 2))
    timesteps, noise = drawn.timesteps, drawn.noise
    shares = torch.histc(timesteps.float(), bins=4, min=0, max=1000) / 4000
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((0, 1), abs=0.03)


# ------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_mean_negative_log_probability_of_the_labels_at_x_t():
    module = module_of(batch=7, diffusion=DiffusionSettings(noise_schedule="cosine"))
    told = []
    module.network.register_forward_pre_hook(lambda _, arguments: told.append(arguments))
    loss = module.training_step((IMAGES, LABELS), 0)
    loss.backward()
    x_0 = IMAGES / 127.5 - 1
    drawn = module._drawn(x_0)
    timesteps, noise = drawn.timesteps, drawn.noise
    times = (timesteps + 1) / 1000
    alpha_bar = (torch.cos((times + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    alpha_bar = alpha_bar[:, None, None, None]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(told[0][0], x_t, rtol=1e-4, atol=1e-4)
    assert torch.equal(told[0][1], timesteps)
    with torch.no_grad():
        log_p = module.network(x_t, timesteps).softmax(dim=1).log()
    want = -sum(float(log_p[k, label]) for k, label in enumerate(LABELS)) / len(LABELS)
    assert float(loss.detach()) == pytest.approx(want, rel=1e-4)
    assert module.logged["train/loss"] == float(loss.detach())
    assert float(module.network.out[2].c_proj.weight.grad.abs().max()) > 0


def test_accuracies_are_logged_and_the_five_likeliest_count_where_there_are_ten_classes():
    module = module_of()
    loss_of(module)
    assert {"train/loss", "train/accuracy", "train/rate", "train/skipped"} == module.logged.keys()
    ten = module_of(changes={"num_classes": 10})
    loss_of(ten)
    assert 0 <= ten.logged["train/accuracy"] <= ten.logged["train/accuracy_top_5"] <= 1


@pytest.mark.parametrize(
    ("labels", "named"),
    [(-torch.ones_like(LABELS), "`data` must have a label"), (LABELS + 1, "got 3 and a label 3")],
)
def test_images_without_a_class_of_the_classifier_are_refused(labels, named):
    with pytest.raises(UserError, match=named):
        loss_of(module_of(), labels)


def test_validation_logs_loss_and_accuracy_whole_and_by_quarter():
    def validated():
        module.on_validation_epoch_start()
        module.validation_step((IMAGES, LABELS), 2)
        module.on_validation_epoch_end()
        return dict(module.logged)

    module = module_of()
    first = validated()
    for name in ("loss", "accuracy"):
        quarters = [first[f"val/{name}_quarter_{q}"] for q in range(4)]
        assert sum(quarters) / 4 == pytest.approx(first[f"val/{name}"], rel=1e-5)
    torch.manual_seed(9)
    module.trainer.fit_loop.total_batch_idx = 50
    assert validated() == first


# ------------------------------------------------------------------------------------------- settings and training


def test_hyperparameters_rebuild_the_settings_and_name_them_as_a_classifier_s():
    diffusion = DiffusionSettings(noise_schedule="cosine")
    module = module_of(diffusion=diffusion, seed=5, freeze=["time_embed.*"])
    saved = dict(module.hparams)
    assert "network" not in saved
    assert ClassifierSettings(**saved["classifier"]) == module.network.settings
    assert DiffusionSettings(**saved["diffusion"]) == diffusion
    assert (saved["freeze"], saved["seed"], saved["max_nonfinite_batches"]) == (["time_embed.*"], 5, 10)


def test_a_released_classifier_s_name_stands_for_its_settings_and_its_process():
    with torch.device("meta"):
        module = ClassifierModule("imagenet64_classifier")
    assert module.network.settings == RELEASED["imagenet64_classifier"].settings
    assert module.diffusion_settings.noise_schedule == "cosine"


@pytest.mark.parametrize("name", ["imagenet64", "imagenet64_classifer"])
def test_what_is_no_classifier_s_name_is_refused_with_those_that_are(name):
    with pytest.raises(UserError, match=r"`model.classifier` must be one of .* Did you mean imagenet64_classifier\?"):
        ClassifierModule(name)


def test_the_optimiser_is_adamw_with_adm_s_weight_decay_and_leaves_frozen_parameters_out():
    module = module_of(freeze=["input_blocks.*"])
    module.trainer.max_steps = 10
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["initial_lr"], group["weight_decay"]) == (3e-4, 0.05)
    trained = {id(p) for n, p in module.network.named_parameters() if not n.startswith("input_blocks.")}
    assert {id(p) for p in group["params"]} == trained


def test_bright_and_dark_images_are_told_apart_in_a_few_dozen_steps():
    bright = torch.arange(64) % 2
    images = (bright * 255).to(torch.uint8)[:, None, None, None].expand(64, 1, 8, 8)
    settings = ClassifierSettings(**{**GREY_CLASSIFIER, "num_classes": 2})
    cosine = DiffusionSettings(noise_schedule="cosine")  # whose x_t can be told apart at nine timesteps in ten
    module = ClassifierModule(settings, cosine, OptimizerSettings(learning_rate=3e-3))
    seen, loader = [], DataLoader(TensorDataset(images, bright), batch_size=32)
    run = trainer(max_steps=60, gradient_clip_val=1.0)
    module.on_train_batch_end = lambda *_: seen.append({n: float(v) for n, v in run.callback_metrics.items()})
    run.fit(module, loader, loader)
    assert seen[0]["train/loss"] > 0.5
    last = [sum(step[f"train/{name}"] for step in seen[-10:]) / 10 for name in ("loss", "accuracy")]
    assert last[0] < 0.3
    assert last[1] > 0.85


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_whose_loss_is_not_finite_trains_nothing_and_is_counted():
    module = ClassifierModule(ClassifierSettings(**GREY_CLASSIFIER), max_nonfinite_batches=1)
    module.network.forward = lambda x, timesteps: torch.full((len(x), CLASSES), torch.nan)
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    with pytest.raises(UserError, match=r"`model.max_nonfinite_batches` allows 1 batches"):
        trainer(max_steps=4).fit(module, loader, loader)
    assert module.skipped == 2
