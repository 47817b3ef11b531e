import socket

import pytest

from sagl.commands.playground import listen, make_form, page_address
from sagl.settings.sampling import SamplerSettings
from tests.helpers.commands import refusal


def test_a_port_of_another_program_is_refused(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        refusal(capsys, tmp_path, "playground", "--port", other.getsockname()[1], names=["--port"])


@pytest.mark.parametrize("flags", [["--port", "70000"], ["--sag.threshold", "nan"], ["--respacing", "banana"]])
def test_settings_at_the_start_are_refused_before_the_page_opens(capsys, flags, tmp_path):
    refusal(capsys, tmp_path, "playground", *flags, names=flags[:1])


def test_the_page_is_open_to_this_machine_only():
    with listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "http://127.0.0.1:7860"), ("0.0.0.0", "http://127.0.0.1:7860"), ("::1", "http://[::1]:7860")],
)
def test_the_printed_address_can_be_opened(host, address):
    assert page_address(host, 7860) == address


def test_a_config_goes_before_the_few_steps_and_images_with_which_the_page_opens(tmp_path):
    (tmp_path / "page.yaml").write_text("{sampler: ddim, respacing: '100', eta: 0.5, num_samples: 9}")
    config = make_form(["--config", str(tmp_path / "page.yaml")]).start
    assert (config.sampler, config.samples.num_samples) == (
        SamplerSettings(sampler="ddim", respacing="100", eta=0.5),
        9,
    )
    config = make_form([]).start
    assert (config.sampler.sampler, config.samples.num_samples) == ("unipc", 4)
