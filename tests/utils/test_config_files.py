import pytest

from sagl.errors import UserError
from sagl.utils.config_files import flatten, read_config, read_configs


def write(folder, *texts):
    paths = [folder / f"{index}.yaml" for index in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return [str(path) for path in paths]


def test_later_configs_override_earlier_ones_setting_by_setting(tmp_path):
    names = write(
        tmp_path,
        "{seed: 1, sag: {scale: 0.1, site: middle}, model: {network: lsun_cat}, classifier: {scale: 1}}",
        "{sag: {scale: 0.5}, model: {network: {dropout: 0.1}}, classifier:, labels: [1]}",
    )
    assert read_configs(names) == {
        "seed": 1,
        "sag": {"scale": 0.5, "site": "middle"},
        "model": {"network": {"dropout": 0.1}},
        "classifier": {"scale": 1},
        "labels": [1],
    }
    assert read_configs(None) == {}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("seed: 1\nseed: 2", "seed"),
        ("sag:\n  scale: 1\nseed: 0\nsag:\n  site: middle", "sag"),
        (
            "model:\n  optimizer: {learning_rate: 1, warmup_steps: 2, 'learning_rate': 3}",
            "model.optimizer.learning_rate",
        ),
        (
            '{"trainer": {"callbacks": [{"class_path": "a"}, {"init_args": {"k": 1, "k": 1}}]}}',
            "trainer.callbacks.init_args.k",
        ),
    ],
)
def test_a_setting_that_a_config_has_twice_is_refused_by_its_full_name(text, name, tmp_path):
    (path,) = write(tmp_path, text)
    with pytest.raises(UserError, match=f"`config` .* {name} twice"):
        read_config(path)


def test_anchors_and_merge_keys_are_no_repetition(tmp_path):
    (path,) = write(tmp_path, "sag: &a {scale: 1}\nclassifier: {<<: *a, scale: 2}\ncfg: *a")
    assert read_config(path)["classifier"] == {"scale": 2}


def test_flattened_settings_have_full_names_in_their_order():
    nested = {"seed": 3, "sag": {"scale": 0.5, "mask": {"site": "middle"}}, "eta": 0}
    assert list(flatten(nested).items()) == [("seed", 3), ("sag.scale", 0.5), ("sag.mask.site", "middle"), ("eta", 0)]
