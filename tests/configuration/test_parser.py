import re
from dataclasses import dataclass
from typing import Literal

import pytest

from sagl.configuration.parser import Parser, field_names, from_namespace, parse_interval_arg, suggest
from sagl.configuration.sample import model_settings, sample_parser
from sagl.configuration.training import training_parser
from sagl.errors import UserError
from sagl.guidance.registry import GUIDANCES
from sagl.settings.guidance import TERM_OPTIONS, SelfAttentionGuidance
from sagl.settings.sampling import SAMPLERS, DeviceSettings, RunSettings, SamplerSettings
from sagl.utils.config_files import read_config

FOLDER_DATA = "sagl.data.folder.FolderData"


@dataclass(frozen=True, kw_only=True)
class Hat:
    """Settings of a hat."""

    size: int = 58
    """Size in centimetres."""
    colour: str | None = None
    """Colour."""


def refusal(*arguments):
    """Return the error message of the parser of `sagl sample`."""
    with pytest.raises(UserError) as error:
        sample_parser().parse(list(arguments))
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- values


def test_home_folders_and_variables_are_expanded_in_options_and_configs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text("output: ~/run\ndata: {init_args: {root: $HOME/images}}\n")
    assert read_config("$HOME/my.yaml") == {
        "output": f"{tmp_path}/run",
        "data": {"init_args": {"root": f"{tmp_path}/images"}},
    }
    values = sample_parser().parse(["--output=~/run 1", "--classifier.checkpoint", "${HOME}/c.pt"])
    assert (values.output, values.classifier.checkpoint) == (f"{tmp_path}/run 1", f"{tmp_path}/c.pt")
    fit = [f"--data={FOLDER_DATA}", "--data.root=~/[a]", "--model.network=lsun_cat", "--trainer.default_root_dir=$HOME"]
    values = training_parser("fit", full=True).parse(fit)
    assert (values.data.init_args.root, values.trainer.default_root_dir) == (f"{tmp_path}/[a]", str(tmp_path))
    assert "ABSENT" in refusal("--output", "$ABSENT/run")


def test_the_fields_of_a_settings_class_are_flags_with_or_without_a_group():
    p = Parser("try", "Try hats.")
    p.add_settings(Hat)
    p.add_settings(Hat, "other")
    values = p.parse(["--size", "60", "--other.colour=red"])
    assert from_namespace(Hat, values) == Hat(size=60)
    assert from_namespace(Hat, values.other) == Hat(colour="red")
    assert field_names(Hat) == ["size", "colour"]
    assert set(p.options) == {"-h", "--help", "--size", "--colour", "--other.size", "--other.colour"}


def test_without_flags_every_setting_has_the_default_of_its_field():
    values = sample_parser().parse([])
    for kind in (RunSettings, SamplerSettings):
        assert from_namespace(kind, values) == kind()
    for group, kind in {**{n: e.settings_class for n, e in GUIDANCES.items()}, "trainer": DeviceSettings}.items():
        assert from_namespace(kind, values[group]) == kind()


@pytest.mark.parametrize("labels", ["random", "null", "3", "0,7,9", "0, 7"])
def test_a_text_that_looks_like_a_number_stays_a_text(labels):
    values = sample_parser().parse(["--labels", labels, "--respacing", "250", "--output", "1e3"])
    assert (values.labels, values.respacing, values.output) == (labels, "250", "1e3")


@pytest.mark.parametrize(
    "flags",
    [
        ["--sag.interval", "0.5,1"],
        ["--sag.interval", "0.5, 1.0"],
        ["--sag.interval=[0.5, 1]"],
    ],
)
def test_an_interval_is_two_numbers_with_brackets_or_without(flags):
    values = sample_parser().parse(flags)
    assert from_namespace(SelfAttentionGuidance, values.sag).interval == (0.5, 1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--labels=0,7", "--respacing", "10,15,20"],
        ["--sag.interval", "0.5"],
        ["--sag.interval", "[0,1]", "0,1"],
        ["--output=a=b,c"],
    ],
)
def test_only_an_interval_of_two_numbers_is_put_in_brackets(arguments):
    assert parse_interval_arg(arguments) == arguments


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--num_samples", "many"], ["`num_samples`", "whole number", "many"]),
        (["--num_samples", "1.5"], ["`num_samples`", "whole number", "1.5"]),
        (["--seed", "null"], ["`seed`", "whole number", "None"]),
        (["--batch_size", "x"], ["`batch_size`", "whole number or null", "x"]),
        (["--sag.scale", "a b"], ["`sag.scale`", "number", "a b"]),
        (["--clip_x0", "maybe"], ["`clip_x0`", "true or false", "maybe"]),
        (["--trainer.precision", "8"], ["`trainer.precision`", "auto, 32-true, bf16-true, 16-true", "8"]),
        (["--num_samples", "9" * 5000], ["`num_samples`", "digits"]),
        (["--sag.scale", "9" * 400], ["`sag.scale`", "float"]),
        (["--sag.interval", "0," + "9" * 400], ["`sag.interval`", "float"]),
        (["--seed"], ["--seed"]),
        (["--seed", "1", "2"], ["'2'"]),
        (["-x"], ["'-x'"]),
        (["--respacng=5"], ["'--respacng'", "--respacing?"]),
        (["--scale", "1"], ["'--scale'", "--sag.scale?"]),
        (["--num_sample", "3"], ["'--num_sample'"]),  # no option may be abbreviated
        (["--comp"], ["'--comp'"]),
    ],
)
def test_a_refusal_names_the_setting_what_is_allowed_and_the_value(arguments, parts):
    message = refusal(*arguments)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("interval", ["0.5", "[0.5]", "0,0.5,1", "a,1", "[0.5,1"])
def test_a_wrong_interval_is_refused_with_the_form_of_a_right_one(interval):
    message = refusal("--sag.interval", interval)
    assert "`sag.interval`" in message
    assert "0.5,1.0" in message


@pytest.mark.parametrize(
    "arguments", [["--compare=yes"], ["--sag", "absent.yaml"], ["--trainer", "cpu"], ["--dry_run", "--compare=1"]]
)
def test_no_refusal_has_the_words_of_the_library(arguments):
    message = refusal(*arguments)
    assert [word for word in ("Parser key", "explicit argument", "Unable to load") if word in message] == []


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"smapler": "ddim"}, ["'smapler'", "sampler?"]),
        ({"sag": {"scal": 1}}, ["'sag.scal'", "sag.scale?"]),
        ({"sag": {"scale": "big"}}, ["`sag.scale`", "number", "big"]),
        ({"respacing": 250}, ["`respacing`", "text", "250"]),
        ({"sag": {"heads": "all"}}, ["`sag.heads`", "layer, sag_release", "all"]),
    ],
)
def test_a_mapping_is_refused_with_the_same_parts(values, parts):
    with pytest.raises(UserError) as error:
        sample_parser().parse_object(values)
    assert [part for part in parts if part not in str(error.value)] == []


def test_a_list_as_text_is_refused_with_the_form_of_a_list():
    with pytest.raises(UserError, match=r"`model\.network\.channel_mult` .*\[1,2,4\].* 1,1,2"):
        model_settings({"model": {"network": {"image_size": 32, "channel_mult": "1,1,2"}}})


def test_the_choices_of_all_types_of_a_setting_are_listed():
    parser = Parser("fit")
    parser.add_argument("--precision", type=Literal[64, 32] | Literal["bf16-mixed", "32-true"] | None)
    with pytest.raises(UserError, match=r"`precision` .* 64, 32, bf16-mixed, 32-true, got 17"):
        parser.parse(["--precision", "17"])


@pytest.mark.parametrize(
    "flag", ["--num_smaples", "--sag.foo", "--cfg.x", "--sga.scale", "--batchsize", "--trainer.prec"]
)
def test_a_flag_that_is_suggested_is_one_that_help_lists(flag):
    p = sample_parser()
    suggested = re.findall(r"Did you mean (\S+)\?", refusal(flag, "3"))
    assert len(suggested) <= 1
    assert set(suggested) <= set(p.options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lsun_cats", " Did you mean lsun_cat?"),
        ("seed", " Did you mean run.seed?"),
        ("rn.seed", " Did you mean run.seed?"),
        ("zebra", ""),
        ("", ""),
    ],
)
def test_the_nearest_name_is_suggested_or_none(name, expected):
    assert suggest(name, iter(["lsun_cat", "lsun_horse", "run.seed"])) == expected
    assert suggest(name, []) == ""


# --------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("columns", ["40", "400"])
def test_the_help_of_sample_has_two_lines_a_flag_and_120_columns_whatever_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    lines, flags = sample_parser().format_help().splitlines(), sample_parser().options
    assert len(flags) < len(lines) <= 2 * len(flags)
    assert max(map(len, lines)) <= 120


def test_help_lists_every_flag_with_its_meaning_and_its_default():
    text = " ".join(sample_parser().format_help().split())
    flags = [flag for flag in sample_parser().options if flag.startswith("--") and f" {flag} " not in text]
    others = list(GUIDANCES)[1:]
    assert flags == [f"--{name}.{option}" for name in others for option in TERM_OPTIONS]  # as those of the first method
    assert "(default: 16)" in text
    assert f"--sampler {{{','.join(SAMPLERS)}}}" in text
    assert "type:" not in text


def test_help_omits_defaults_that_say_nothing():
    assert re.findall(r"default: (?:null|False|\[\]|\))", sample_parser().format_help()) == []


def test_help_prints_defaults_of_0_and_false_but_none_of_flags_without_a_value():
    p = Parser("try", "Try options.")
    p.add_argument("--count", type=int, default=0)
    p.add_argument("--fraction", type=float, default=0.5)
    p.add_argument("--is_soft", type=bool, default=False)
    p.add_argument("--overwrite", action="store_true", help="Replace.")
    p.add_argument("--name", type=str, default=None, help="Name.")
    defaults = dict(re.findall(r"--(\w+) .*\(default: (.+)\)$", p.format_help(), re.M))
    assert defaults == {"count": "0", "fraction": "0.5", "is_soft": "false"}


@pytest.mark.parametrize(("nargs", "usage"), [(None, "RUN"), ("?", "[RUN]"), ("+", "RUN [RUN …]")])
def test_the_line_of_usage_has_the_positional_arguments_before_the_options(nargs, usage):
    p = Parser("try", "Try runs.")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("run", type=str, nargs=nargs)
    assert p.format_help().splitlines()[0] == f"usage: sagl try {usage} [options]"


def test_help_names_the_shared_options_that_a_guidance_method_refuses():
    values = {
        "direction_head": "auto",
        "renew_every": 2,
        "reuse_before": "output.3",
        "stop_below": 0.1,
        "max_norm": 1.0,
    }
    values |= {"shape": "off_x0", "shape_weight": 0.5, "shape_sigma": 1.0}
    assert values.keys() == set(TERM_OPTIONS)
    refused = set()
    for name, entry in GUIDANCES.items():
        for option, value in values.items():
            try:
                entry.settings_class(**{option: value})
            except UserError:
                refused.add((name, option))
    (exceptions,) = re.findall(r"Exceptions: (.*)", sample_parser().epilog, re.S)
    clauses = exceptions.split(";")
    options = {(name, option) for name in GUIDANCES for option in values}
    assert {(n, o) for n, o in options if any(n in clause and o in clause for clause in clauses)} == refused


def test_an_integer_that_no_float_can_hold_is_refused_in_a_config_too():
    with pytest.raises(UserError, match=r"`sag\.scale` must fit a float"):
        sample_parser().parse_object({"sag": {"scale": 10**400}})


@pytest.mark.parametrize(
    ("flag", "value", "parts"),
    [
        ("--model.optimizer.betas", "[0.9]", ["`model.optimizer.betas` must be a list with 2 elements", "[0.9]"]),
        ("--data.batch_size", "1.0", ["data: `batch_size`", "whole number", "1.0"]),
        ("--data.start_method", "thread", ["data: `start_method`", "fork, spawn", "thread"]),
        ("--data", "absent.Data", ["`data`", "absent.Data", "No module"]),
    ],
)
def test_a_refusal_of_a_training_names_the_setting_too(flag, value, parts):
    data = ["--data", "sagl.data.folder.FolderData", "--data.root", "x"]
    with pytest.raises(UserError) as error:
        training_parser("fit", full=True).parse([*data, flag, value])
    assert [part for part in parts if part not in str(error.value)] == []


@pytest.mark.parametrize("flag", ["--output", "--checkpoint", "--labels"])
def test_an_option_is_not_empty_unless_that_is_its_default(flag):
    with pytest.raises(UserError, match=f"`{flag[2:]}` must not be empty"):
        sample_parser().parse([flag, ""])
    assert sample_parser().parse(["--exports", ""]).exports == ""
