import re
from dataclasses import dataclass

import pytest

from sagl.commands._config import sample_parser
from sagl.commands._parser import Parser, field_names, from_namespace, parse_interval_arg, suggest
from sagl.errors import UserError
from sagl.guidance.registry import GUIDANCES
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import DeviceSettings, RunSettings, SamplerSettings


@dataclass(frozen=True, kw_only=True)
class Hat:
    """What is worn."""

    size: int = 58
    """In centimetres."""
    colour: str | None = None
    """Any."""


def refusal(*arguments):
    """What the parser of `sagl sample` says of a command line that it refuses."""
    with pytest.raises(UserError) as error:
        sample_parser().parse(list(arguments))
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- values


def test_the_fields_of_a_settings_class_are_flags_alone_or_in_a_group():
    p = Parser("try", "Try hats.")
    p.add_settings(Hat)
    p.add_settings(Hat, "other")
    given = p.parse(["--size", "60", "--other.colour=red"])
    assert from_namespace(Hat, given) == Hat(size=60)
    assert from_namespace(Hat, given.other) == Hat(colour="red")
    assert field_names(Hat) == ["size", "colour"]
    assert set(p.options) == {"-h", "--help", "--size", "--colour", "--other.size", "--other.colour"}


def test_without_flags_every_setting_has_the_default_of_its_field():
    given = sample_parser().parse([])
    for kind in (RunSettings, SamplerSettings):
        assert from_namespace(kind, given) == kind()
    for group, kind in {**{n: e.settings_class for n, e in GUIDANCES.items()}, "trainer": DeviceSettings}.items():
        assert from_namespace(kind, given[group]) == kind()


@pytest.mark.parametrize("labels", ["random", "null", "3", "0,7,9", "0, 7"])
def test_a_text_is_taken_as_it_is_whatever_it_looks_like(labels):
    given = sample_parser().parse(["--labels", labels, "--respacing", "250", "--output", "1e3"])
    assert (given.labels, given.respacing, given.output) == (labels, "250", "1e3")


@pytest.mark.parametrize(
    "flags",
    [
        ["--sag.interval", "0.5,1"],
        ["--sag.interval=0.5,1"],
        ["--sag.interval", "0.5, 1.0"],
        ["--sag.interval", "[0.5,1]"],
        ["--sag.interval=[0.5, 1]"],
    ],
)
def test_an_interval_is_two_numbers_with_brackets_or_without(flags):
    given = sample_parser().parse(flags)
    assert from_namespace(SelfAttentionGuidance, given.sag).interval == (0.5, 1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--labels", "0,7"],
        ["--labels=0,7", "--respacing", "10,15,20"],
        ["--sag.interval"],
        ["--sag.interval", "0.5"],
        ["--sag.interval", "[0,1]", "0,1"],
        ["--output=a=b,c"],
    ],
)
def test_nothing_but_an_interval_of_two_is_put_in_brackets(arguments):
    assert parse_interval_arg(arguments) == arguments


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num_samples", "many"], "`num_samples` must be a whole number, got many."),
        (["--num_samples", "1.5"], "`num_samples` must be a whole number, got 1.5."),
        (["--seed", "null"], "`seed` must be a whole number, got None."),
        (["--batch_size", "x"], "`batch_size` must be a whole number or null, got x."),
        (["--sag.scale", "a b"], "`sag.scale` must be a number, got a b."),
        (["--clip_x0", "maybe"], "`clip_x0` must be true or false, got maybe."),
        (["--sampler", "euler"], "`sampler` must be one of ddpm, ddim, got euler."),
        (["--sag.heads", "all"], "`sag.heads` must be one of layer, sag_release, got all."),
        (["--trainer.precision", "8"], "`trainer.precision` must be one of auto, 32-true, bf16-true, 16-true, got 8."),
        (["--seed"], "--seed needs a value. --help says which."),
        (["--sag.interval"], "--sag.interval needs a value. --help says which."),
        (["stray"], "there is no option 'stray'. --help lists all."),
        (["--seed", "1", "2"], "there is no option '2'. --help lists all."),
        (["-x"], "there is no option '-x'. --help lists all."),
        (["--nonsense", "3"], "there is no option '--nonsense'. --help lists all."),
        (["--respacng=5"], "there is no option '--respacng'. Did you mean --respacing? --help lists all."),
        (["--scale", "1"], "there is no option '--scale'. Did you mean --sag.scale? --help lists all."),
    ],
)
def test_a_refusal_is_one_line_with_the_setting_what_is_allowed_and_what_came(arguments, said):
    assert refusal(*arguments) == said


@pytest.mark.parametrize("interval", ["0.5", "[0.5]", "0,0.5,1", "a,1", "[0.5,1"])
def test_a_wrong_interval_is_refused_with_the_form_of_a_right_one(interval):
    said = refusal("--sag.interval", interval)
    assert said.startswith("`sag.interval` must be two fractions like 0.5,1.0: from the noisiest step (0)")


@pytest.mark.parametrize(
    "arguments", [["--compare=yes"], ["--sag", "absent.yaml"], ["--trainer", "cpu"], ["--dry_run", "--compare=1"]]
)
def test_no_refusal_is_in_the_words_of_the_parser_s_inside(arguments):
    said = refusal(*arguments)
    assert [word for word in ("Parser key", "explicit argument", "Unable to load") if word in said] == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nope": 1}, "there is no setting 'nope'."),
        ({"smapler": "ddim"}, "there is no setting 'smapler'. Did you mean sampler?"),
        ({"sag": {"scal": 1}}, "there is no setting 'sag.scal'. Did you mean sag.scale?"),
        ({"sag": {"scale": "big"}}, "`sag.scale` must be a number, got big."),
        ({"respacing": 250}, "`respacing` must be text, got 250."),
        ({"sag": {"heads": "all"}}, "`sag.heads` must be one of layer, sag_release, got all."),
    ],
)
def test_a_mapping_is_refused_in_the_same_words(values, said):
    with pytest.raises(UserError) as error:
        sample_parser().parse_object(values)
    assert str(error.value) == said


@pytest.mark.parametrize("flag", ["--num_sample", "--sag.scal", "--comp", "--num_sample=3", "--sag.i"])
def test_no_flag_may_be_abbreviated(flag):
    assert refusal(flag, "3").startswith(f"there is no option {flag.split('=')[0]!r}.")


@pytest.mark.parametrize(
    "flag", ["--num_smaples", "--sag.foo", "--cfg.x", "--sga.scale", "--batchsize", "--trainer.prec"]
)
def test_a_flag_that_is_suggested_is_one_that_help_lists(flag):
    p = sample_parser()
    suggested = re.findall(r"Did you mean (\S+)\?", refusal(flag, "3"))
    assert len(suggested) <= 1
    assert set(suggested) <= set(p.options)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("lsun_cats", " Did you mean lsun_cat?"),
        ("seed", " Did you mean run.seed?"),
        ("rn.seed", " Did you mean run.seed?"),
        ("zebra", ""),
        ("", ""),
    ],
)
def test_the_nearest_name_is_suggested_or_none(name, want):
    assert suggest(name, iter(["lsun_cat", "lsun_horse", "run.seed"])) == want
    assert suggest(name, []) == ""


# --------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("columns", ["40", "400"])
def test_the_help_of_sample_is_two_screens_of_120_columns_whatever_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    lines = sample_parser().format_help().splitlines()
    assert 40 < len(lines) <= 110
    assert max(map(len, lines)) <= 120


def test_help_lists_every_flag_with_its_meaning_and_its_default():
    text = " ".join(sample_parser().format_help().split())
    assert [flag for flag in sample_parser().options if flag.startswith("--") and f" {flag} " not in text] == []
    assert "(default: 16)" in text
    assert "--sampler {ddpm,ddim}" in text
    assert "type:" not in text


def test_help_is_silent_on_defaults_that_say_nothing():
    assert re.findall(r"default: (?:null|False|\[\]|\))", sample_parser().format_help()) == []
