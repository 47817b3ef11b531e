import socket

import pytest

from sagl.commands.playground import listen
from tests.helpers.commands import exit_code


def test_a_port_of_another_program_is_refused(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert exit_code("playground", "--port", other.getsockname()[1]) == 2
    assert "--port" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--port", "70000"], ["--sag.threshold", "nan"], ["--respacing", "banana"]])
def test_settings_at_the_start_are_refused_before_the_page_opens(capsys, flags):
    assert exit_code("playground", *flags) == 2
    assert flags[0] in capsys.readouterr().err


def test_the_page_is_open_to_this_machine_only():
    with listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
