from pathlib import Path

import pytest

from sagl.configuration.sample import parse_sample_config
from sagl.errors import UserError
from sagl.guidance.registry import GUIDANCES
from sagl.playground.controls import flat_settings
from tests.helpers.commands import exit_code
from tests.helpers.errors import refused
from tests.helpers.networks import write_grey_unet
from tests.helpers.playground import compare, make_playground, values_of


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    return make_playground(tmp_path_factory.mktemp("playground"))


def test_every_method_of_the_registry_and_every_setting_has_a_control_with_the_help_of_its_flag(playground):
    controls = [control for group in playground.form.groups.values() for control in group]
    assert set(playground.form.groups) == {"samples", "sampler", *GUIDANCES}
    assert {control.name for control in controls} == set(flat_settings(playground.form.start))
    assert all(control.help for control in controls)
    kinds = {control.name: (control.kind, control.choices[:1]) for control in controls}
    assert kinds["sag.mask"] == ("choice", ("attention",))
    assert kinds["sag.soft"] == ("checkbox", ())
    assert kinds["sag.head"] == ("integer", ())
    assert kinds["pag.max_norm"] == ("number", ())
    assert kinds["sag.interval"] == kinds["labels"] == ("text", ())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 7, "labels": "0,2", "first_id": 3, "clip_x0": False},
        {"sampler": "ddim", "eta": 0.3, "respacing": "ddim4"},
        {"sag.interval": "0.25,1", "sag.soft": True, "sag.area_fraction": 0.1, "pag.scale": 1, "pag.site": "output.1"},
        {"sag.scale": 0, "history.scale": 0.1, "history.average": "x0_hat", "history.max_norm": 0.30000000000000004},
    ],
)
def test_the_command_line_stands_for_the_settings_of_the_page(playground, changes):
    form = playground.form
    request = form.request(form.network, values_of(playground, **changes))
    assert parse_sample_config(request.arguments) == request.config
    settings = flat_settings(request.config)
    assert {name: settings[name] for name in changes} == {
        name: (0.25, 1.0) if name == "sag.interval" else value for name, value in changes.items()
    }


def test_settings_of_a_method_that_is_off_are_not_on_the_command_line(playground):
    request = playground.form.request(playground.form.network, values_of(playground, pag__site="output.1", seed=3))
    assert "--seed" in request.arguments
    assert not [argument for argument in request.arguments if argument.startswith("--pag")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("respacing", "banana"),
        ("labels", "9"),
        ("seed", None),
        ("sag.threshold", None),
        ("sag.site", "output.9"),
        ("sag.interval", "0.9,0.1"),
        ("sag.area_fraction", 2.0),
        ("cfg.scale", "much"),
        ("autoguidance.scale", 1),
    ],
)
def test_a_value_is_refused_with_the_message_of_the_command_line(playground, capsys, tmp_path, name, value):
    values = values_of(playground, **{"labels": "0", name: value})
    with pytest.raises(UserError) as error:
        compare(playground, **values)
    flags = [f"--{name}={'null' if value is None else value}" for name, value in values.items()]
    flags = [flag.lower() if flag.endswith(("True", "False")) else flag for flag in flags]
    assert exit_code("sample", *playground.form.network_arguments, *flags, "--output", tmp_path / "run") == 2
    assert capsys.readouterr().err == f"sagl sample: {playground.message(error.value)}\n"


def test_the_page_samples_a_bounded_number_of_images(playground):
    with pytest.raises(UserError, match="num_samples"):
        compare(playground, num_samples=1000)


@pytest.mark.parametrize("name", ["autoguidance.checkpoint", "classifier.checkpoint", "sag.direction_head"])
def test_paths_are_refused(playground, tmp_path, name):
    with pytest.raises(UserError, match=rf"`{name}`.*allow_files"):
        compare(playground, **{name: str(tmp_path / "other.safetensors")})


def test_a_network_of_the_page_is_a_name(playground, tmp_path):
    with pytest.raises(UserError, match="`model`"):
        playground.form.start_values(str(write_grey_unet(tmp_path / "other.safetensors")))
    assert playground.form.start_values("fashion_mnist")["labels"] == "balanced"


def test_no_network_is_downloaded_from_the_hub_for_the_page(playground, monkeypatch):
    for module in ("sagl.models.sources", "sagl.models.zoo"):
        monkeypatch.setattr(f"{module}.download_from_hub", lambda *_: pytest.fail("downloaded"))
    with refused("`model`", "hf:someone/net", "--allow_files"):
        playground.form.start_values("hf:someone/net")
    with refused("`model`", "hf:someone/net"):
        playground.form.request("hf:someone/net", values_of(playground))


def test_with_allow_files_a_network_may_be_one_of_the_hub(tmp_path, monkeypatch):
    form, other = make_playground(tmp_path, "--allow_files").form, write_grey_unet(tmp_path / "other.safetensors")
    monkeypatch.setattr("sagl.models.sources.download_from_hub", lambda name: other)
    request = form.request("hf:someone/net", form.start_values("hf:someone/net"))
    assert request.config.source.checkpoint == other
    assert "--model=hf:someone/net" in request.arguments


def test_with_allow_files_networks_and_settings_may_be_paths(tmp_path):
    form, other = make_playground(tmp_path, "--allow_files").form, str(write_grey_unet(tmp_path / "other.safetensors"))
    request = form.request(
        other, form.start_values(other) | {"autoguidance.scale": 1, "autoguidance.checkpoint": other}
    )
    assert request.config.source.checkpoint == Path(other)
    assert request.config.guidances["autoguidance"].checkpoint == other


@pytest.mark.parametrize("value", ["$HOME", "~", "${PATH}"])
def test_variables_and_home_folders_are_not_expanded(playground, value):
    with pytest.raises(UserError) as error:
        compare(playground, labels=value)
    assert value in str(error.value)


@pytest.mark.parametrize("value", ["--config=secret.yaml", "--checkpoint=/etc/passwd", "0 --output=/tmp"])
def test_a_value_cannot_add_another_option(playground, value):
    with pytest.raises(UserError, match="`labels`"):
        compare(playground, labels=value)
    with pytest.raises(UserError, match="`model`"):
        playground.form.start_values(value)
