"""Command lines and YAML files drawn from the types of the settings: each is run, or refused in one line.

Accepted sizes are small, so that no example samples for long.
"""

import contextlib
import copy
import io
import math
import os
import shutil
import types
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from sagl.configuration import sample as sample_configuration
from sagl.configuration.parser import field_names
from sagl.configuration.sample import sample_parser
from sagl.guidance.registry import GUIDANCES
from sagl.settings.sampling import DeviceSettings, RunSettings, SamplerSettings
from tests.helpers.commands import exit_code
from tests.helpers.networks import write_grey_unet

GROUPS = {"": (RunSettings, SamplerSettings), "trainer": (DeviceSettings,)}
GROUPS |= {name: (entry.settings_class,) for name, entry in GUIDANCES.items()}
TYPES = {
    f"{group}.{name}".strip("."): kind
    for group, classes in GROUPS.items()
    for settings_class in classes
    for name, kind in get_type_hints(settings_class).items()
    if name in field_names(settings_class)
}
"""Every setting of a run, by its flag's name: sag.scale, num_samples, …"""

SMALL = {"num_samples": 1, "respacing": "2", "batch_size": 1}
"""Values of settings that are not drawn."""
SENSIBLE = {
    "num_samples": st.integers(1, 3),
    "respacing": st.sampled_from(["1", "2", "ddim4", "1,1", "1,1,1", "logsnr2"]),
    "batch_size": st.integers(1, 4) | st.none(),
    "labels": st.sampled_from(["random", "balanced", "null", "0", "2,1", "0, 1"]),
    "sag.site": st.sampled_from(["input.1", "middle", "output.0", "output.1"]),
    **dict.fromkeys(["pag.site", "seg.site", "tpg.site"], st.sampled_from(["middle", "input.1, output.0"])),
    "sag.kernel_size": st.sampled_from([1, 3, 15, None]),
    "eta": st.just(0.0) | st.floats(0, 1),
    **dict.fromkeys([f"{name}.interval" for name in GUIDANCES], st.sampled_from([[0.0, 1.0], [0.5, 0.5], [0, 0.25]])),
    **dict.fromkeys([f"{name}.renew_every" for name in GUIDANCES], st.integers(1, 4)),
    **dict.fromkeys([f"{name}.stop_below" for name in GUIDANCES], st.floats(0, 2)),
    **{f"{name}.{part}": st.none() | st.floats(0.01, 9) for name in GUIDANCES for part in ("max_norm", "shape_sigma")},
    "sag.mask": st.sampled_from(["attention", "global", "random", "square"]),
    "sag.area_fraction": st.none() | st.floats(0.01, 1),
    "sag.head": st.none() | st.just(0),
    **dict.fromkeys(["sag.blur_sigma", "blur.blur_sigma"], st.floats(0.1, 1e4)),
    "blur.kernel_size": st.sampled_from([1, 15, None]),
    "seg.blur_sigma": st.floats(0.1, 1e4) | st.none(),
    "tsg.noise_exponent": st.floats(0, 3),
    "history.decay": st.floats(0, 0.99),
    "history.renew_every": st.just(1),
    **dict.fromkeys(["eps_scaling.scale", "eps_scaling.slope"], st.floats(0, 1)),
    "autoguidance.scale": st.just(0.0),
    "classifier.scale": st.just(0.0),
    "classifier.checkpoint": st.none(),
    "trainer.accelerator": st.sampled_from(["auto", "cpu"]),
    "trainer.num_nodes": st.just(1),
    "trainer.compile": st.just(False),
    "trainer.devices": st.sampled_from(["auto", "-1", "1"]),
}
"""Values of settings whose type allows too much, or values that take long."""

WORDS = ["", " ", "word", "ü", "日本", "٣", "²", "\n", "a\tb", "'", '"', "{", "[", "]", "%s", "{0}", "null", "~"]
WORDS += ["true", "off", "--", "-", "-x", "@x", "$HOME", "../..", "0,,1", ",", "1e", "ddim", "ddim0", "ddim400", "1001"]
EDGES = [0, -1, -(2**31), 2**32, 2**63, 2**64, 10**30, 0.5, -0.0, 1.5, 1e300, 5e-324]
EDGES += [math.nan, math.inf, -math.inf, True, False]
NESTED = [[], [1, 2], [0.6, 0.2], [[0, 1], 1], [None, 1], ["a"], [math.nan, 1], {}, {"a": 1}, {"scale": 1}, {1: 2}]
NESTED += [{None: 3}, {"class_path": "os.system", "init_args": {}}]
LONG = {
    "trainer.compile": [True, "true"],
    "num_samples": [2**32, 2**63, 2**64, 10**30],
    "batch_size": [2**32, 2**63, 2**64, 10**30],
}
"""Values that would be refused late or take too long."""
NAMES = ["num_sample", "sag.scal", "sag.", ".", "sagscale", "SAG.scale", "ünï", "sag.scale.scale", "cfg.site"]
NAMES += ["num-samples", "model.network", "data", "trainer", "sag", "cfg", "classifier"]


def of_type(kind):
    """Return values that a type allows."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return st.one_of([of_type(part) for part in parts])
    if origin is Literal:
        return st.sampled_from(parts)
    if origin is tuple:
        return st.tuples(*map(of_type, parts)).map(list)
    plain = {bool: st.booleans(), int: st.integers(0, 1000), type(None): st.none(), str: st.sampled_from(WORDS)}
    return (plain | {float: st.floats(-100, 100)})[kind]


def sensible(name):
    """Return a setting with a value that is mostly allowed."""
    return st.tuples(st.just(name), SENSIBLE.get(name, of_type(TYPES[name])))


def wrong(name):
    """Return a setting with a value of any kind."""
    long = LONG.get(name, [])
    allowed = [value for value in WORDS + EDGES if value not in long]
    empty = [] if name == "respacing" else [None]  # the default is 250 steps
    return st.tuples(st.just(name), st.sampled_from(allowed + NESTED + empty))


ANY = st.sampled_from(sorted(TYPES))
WRONG = ANY.flatmap(wrong) | st.tuples(st.sampled_from(NAMES), st.sampled_from(WORDS + EDGES))


def mixed(num_wrong):
    """Return up to four sensible settings and some wrong ones in any order; the last one of a name counts."""
    drawn = st.tuples(
        st.lists(ANY.flatmap(sensible), max_size=4), st.lists(WRONG, min_size=num_wrong, max_size=num_wrong)
    )
    return drawn.flatmap(lambda lists: st.permutations(lists[0] + lists[1]))


PAIRS = st.sampled_from([0, 0, 0, 1, 2]).flatmap(mixed)


def as_text(value):
    """Return a value as it is typed."""
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    )


def nested(pairs):
    """Return settings as nested mappings."""
    tree = {}
    for name, value in pairs:
        *groups, leaf = name.split(".")
        where = tree
        for group in groups:
            if not isinstance(where.get(group), dict):
                where[group] = {}
            where = where[group]
        where[leaf] = value
    return tree


def as_command_line(pairs):
    """Return flags and values as one or as two arguments."""
    forms = [lambda name, text: [f"--{name}", text], lambda name, text: [f"--{name}={text}"]]
    draws = [st.sampled_from(forms).map(lambda form, pair=pair: form(pair[0], as_text(pair[1]))) for pair in pairs]
    stray = st.sampled_from(
        [[]] * 12 + [["stray"], [""], ["--dry_run"], ["--compare"], ["--exports", "grid"], ["--exports"]]
    )
    return st.tuples(*draws, stray).map(lambda parts: [part for flag in parts for part in flag])


def as_yaml(pairs):
    """Return the text of a YAML file, sometimes truncated or broken."""
    text = yaml.safe_dump(nested([*SMALL.items(), *pairs]), allow_unicode=True)
    whole = st.just(text)
    cut = st.integers(0, 6).map(lambda sevenths: text[: len(text) * sevenths // 7])
    broken = st.sampled_from(["\t", "{", ": :", "&a *a", "!!python/name:os.system", "\0", "- 1\n", "é"])
    return st.one_of(whole, whole, whole, whole, st.tuples(broken, whole).map("".join), cut)


def examples(count):
    """Draw `count` examples, always the same."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    quiet += [HealthCheck.function_scoped_fixture]
    same = {"max_examples": count, "derandomize": True, "database": None, "phases": [Phase.generate]}
    return settings(**same, deadline=None, suppress_health_check=quiet)  # no shrinking: examples are short


@pytest.fixture(scope="module", autouse=True)
def hypothesis_folder(tmp_path_factory):
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_grey_unet(tmp_path_factory.mktemp("network") / "tiny.safetensors")


@pytest.fixture
def exit_code_of_sample(tiny, tmp_path, monkeypatch):
    """Run a request in an empty folder and check its output; return the exit code."""
    folder, parser = tmp_path / "folder", sample_parser()
    # building one takes much longer than a copy
    monkeypatch.setattr(sample_configuration, "sample_parser", lambda: copy.deepcopy(parser))
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder.mkdir()
    monkeypatch.chdir(folder)  # and back at the end

    def run(arguments, images=None):
        shutil.rmtree(folder)
        folder.mkdir()
        os.chdir(folder)
        stderr = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            code = exit_code("sample", "--checkpoint", tiny, "--output", "run", "--progress", "off", *arguments)
        assert code in (0, 2)
        files = sorted(path.name for path in folder.iterdir())
        if code == 2:
            assert stderr.getvalue().startswith("sagl sample: ")
            assert stderr.getvalue().endswith("\n")
            assert len(stderr.getvalue().splitlines()) == 1
            assert files == []
        elif "--dry_run" in arguments:
            assert files == []
        else:
            assert files == ["run"]
            assert (folder / "run" / "run.json").is_file()
            pngs = [path for path in (folder / "run" / "images").iterdir() if path.suffix == ".png"]
            assert len(pngs) == images
        return code

    return run


def last_value(pairs, name):
    """Return the last value of a setting."""
    return [value for other, value in pairs if other == name][-1]


def assert_both_outcomes(codes, count):
    """Check that all examples were drawn, and that neither outcome is rare."""
    assert len(codes) >= count
    assert 0.1 <= codes.count(0) / len(codes) <= 0.9


SLOW = pytest.mark.slow


@pytest.mark.parametrize("count", [70, pytest.param(1400, marks=SLOW)])
def test_every_command_line_is_run_or_refused_in_one_line(count, exit_code_of_sample):
    codes = []
    lines = PAIRS.flatmap(lambda pairs: st.tuples(st.just([*SMALL.items(), *pairs]), as_command_line(pairs)))

    @examples(count)
    @given(lines)
    def check(drawn):
        pairs, line = drawn
        small = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
        codes.append(exit_code_of_sample([*small, *line], last_value(pairs, "num_samples")))

    check()
    assert_both_outcomes(codes, count)


@pytest.mark.parametrize("count", [30, pytest.param(600, marks=SLOW)])
def test_every_config_is_run_or_refused_in_one_line(count, exit_code_of_sample, tmp_path):
    codes, file = [], tmp_path / "drawn.yaml"

    @examples(count)
    @given(PAIRS.flatmap(as_yaml))
    def check(text):
        file.write_text(text)
        codes.append(exit_code_of_sample(["--config", file, "--num_samples", "2", "--respacing", "2"], 2))

    check()
    assert_both_outcomes(codes, count)


def test_every_setting_is_drawn():
    assert {*SENSIBLE, *SMALL, *LONG} <= set(TYPES)
    assert len(TYPES) == sum(len(field_names(c)) for classes in GROUPS.values() for c in classes)
    assert {of_type(kind).is_empty for kind in TYPES.values()} == {False}
