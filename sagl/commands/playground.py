"""`sagl playground`: a page on which guidance can be tried."""

import socket

from sagl.configuration.parser import Parser, field_names
from sagl.configuration.sample import network_parser, parse_sample_config, sample_parser
from sagl.errors import UserError, require_range
from sagl.models.zoo import DEFAULT_MODEL
from sagl.playground.controls import QUICK, CommandLine, Form
from sagl.sampling.run import SamplingRun
from sagl.settings.sampling import DeviceSettings
from sagl.utils.config_files import read_configs, to_text
from sagl.utils.environment import set_threads
from sagl.utils.signals import Interrupted

NETWORK = ("config", "model", "checkpoint", "weights")
DEVICES = ("batch_size", *(f"trainer.{name}" for name in field_names(DeviceSettings)))


def playground_parser() -> Parser:
    """Build the parser of `sagl playground`."""
    start = f"The page starts with {' '.join(QUICK)},\nunless flags or a config set other values."
    p = network_parser(
        "playground", "Open a page on which guidance can be tried, with the settings of sagl sample.", start
    )
    p.add_argument("--host", type=str, default="127.0.0.1", help="Address to listen at; 0.0.0.0: from other machines.")
    p.add_argument("--port", type=int, default=7860, help="Port to listen at; 0: a free one.")
    p.add_argument("--allow_files", action="store_true", help="Open files whose paths are entered on the page.")
    return p


def main(arguments: list[str]) -> None:
    """Run `sagl playground [--port N] [options of sagl sample]`.

    Raises:
        UserError: the request cannot be met.
        Interrupted: a stop signal ended the page.
    """
    parser = playground_parser()
    flags = parser.parse(arguments)
    require_range("port", flags.port, 0, 65535)
    form = make_form(arguments)
    SamplingRun.without_folder(form.request(form.network, form.start_values(form.network)).config)
    listener = listen(flags.host, flags.port)
    try:
        from sagl.playground.server import make_server
        from sagl.playground.session import Playground
    except ModuleNotFoundError as error:
        raise UserError(f"`playground` needs {error.name}: pip install 'sagl[demo]'") from error
    set_threads()
    host, port = listener.getsockname()[:2]
    print(f"Open {page_address(host, port)} in a browser. Ctrl-C ends the page.", flush=True)
    server = make_server(Playground(form))
    try:
        server.run(sockets=[listener])
    except Interrupted as end:
        raise Interrupted(end.number, "the page has ended; images that were not downloaded are gone") from None


def page_address(host: str, port: int) -> str:
    """Return the address of the page in a browser of this machine; of all addresses (0.0.0.0), that of itself."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 stands for a free one.

    Raises:
        UserError: another program has the port, or the machine does not have the address.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"`host` and `port` must be free, got {host} and {port}: {reason}. Set another `port`."
        ) from error


def make_form(arguments: list[str]) -> Form:
    """Return the controls of the page with the values of a command line.

    Raises:
        UserError: the command line is refused.
    """
    parser, sample = playground_parser(), sample_parser()
    flags, defaults = parser.parse(arguments), parser.parse([])

    def given(names: tuple[str, ...]) -> list[str]:
        return [part for name in names if flags[name] != defaults[name] for part in _flags(name, flags[name])]

    configured = read_configs(flags.config)
    quick = [flag for flag in QUICK if flag.removeprefix("--").partition("=")[0] not in configured]
    return Form(
        command_line=CommandLine(parse=parse_sample_config, help_texts=sample.help_texts, with_flags=sample.with_flags),
        network=flags.checkpoint or flags.model or ",".join(flags.config or [DEFAULT_MODEL]),
        network_arguments=given(NETWORK),
        device_arguments=given(DEVICES),
        start=parse_sample_config([*quick, *arguments], parser),
        allow_files=flags.allow_files,
    )


def _flags(name: str, value: object) -> list[str]:
    """Return a flag with its value; one of a list has every value in a flag of its own."""
    return [part for item in (value if isinstance(value, list) else [value]) for part in (f"--{name}", to_text(item))]
