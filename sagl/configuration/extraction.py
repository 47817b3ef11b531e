"""Flags of the commands that extract features."""

from argparse import SUPPRESS

from jsonargparse import Namespace

from sagl.configuration.parser import Parser, from_namespace
from sagl.settings.evaluation import ExtractionSettings
from sagl.settings.sampling import DeviceSettings
from sagl.utils.distributed import require_launcher


def add_extraction_settings(p: Parser) -> None:
    """Add the flags of the extraction of features and of the devices."""
    p.add_settings(ExtractionSettings)
    p.add_class_arguments(DeviceSettings, "trainer", as_group=True, skip={"precision", "compile"})
    p._option_string_actions["--trainer"].help = SUPPRESS


def extraction_settings(args: Namespace) -> tuple[ExtractionSettings, DeviceSettings]:
    """Return the settings of these flags.

    Raises:
        UserError: a value is out of range, or several nodes are requested without a launcher.
    """
    devices = DeviceSettings(**vars(args.trainer))
    require_launcher(devices)
    return from_namespace(ExtractionSettings, args), devices
