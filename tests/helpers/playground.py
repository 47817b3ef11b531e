"""The page of `sagl playground` for a tiny network, without a browser."""

from sagl.commands.playground import make_form
from sagl.playground.session import Playground
from tests.helpers.networks import write_grey_unet

SETTINGS = ["--num_samples=2", "--respacing=3", "--trainer.precision=32-true"]
SAG = ["--sag.scale=0.5", "--sag.site=output.0", "--sag.blur_sigma=1"]


def make_playground(folder, *flags):
    """Return a playground with a tiny network, guided by SAG."""
    network = folder / "tiny.safetensors"
    if not network.exists():
        write_grey_unet(network)
    return Playground(make_form([f"--checkpoint={network}", *SETTINGS, *SAG, *flags]))


def compare(playground, kept=None, **changes):
    """Sample with the values at the start and changes of them, whose names have __ for a dot; return the rows."""
    *_, last = playground.compare(playground.form.network, values_of(playground, **changes), kept)
    return last


def values_of(playground, **changes):
    values = playground.form.start_values(playground.form.network)
    return values | {name.replace("__", "."): value for name, value in changes.items()}
