import base64
import re
import subprocess
import sys

import pytest

from sagl.sampling.run_folder import SAMPLES, iter_samples
from tests.helpers.commands import exit_code, refusal
from tests.helpers.files import contents
from tests.helpers.networks import write_grey_unet
from tests.helpers.run_folders import json_result, random_png, write_run

MARKUP = "<script>alert('x')</script> [red]\x1b[31m"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs of six images with different scales, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", sag={"scale": 0.3}, results=[json_result({"fd": 12.3})])
    write_run(tmp_path / "b", first_image=100, results=[json_result({"fd": 14.8})])
    return tmp_path


def compare(capsys, *arguments):
    """What the command prints."""
    assert exit_code("compare", *arguments) == 0
    return capsys.readouterr().out


def images_in(page):
    """PNG files of a page, in its order."""
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text())]


def has_row(output, *cells):
    return re.search(r"^ +" + " +".join(map(re.escape, cells)) + r" *$", output, re.MULTILINE)


# -------------------------------------------------------------------------------------------------- report


def test_the_terminal_shows_settings_metrics_and_cost(runs, capsys):
    before = contents(runs)
    output = compare(capsys, "a", "b")
    assert has_row(output, "a", "b")
    assert has_row(output, "sag.scale", "0.3", "0.0")
    assert has_row(output, "Fréchet distance ↓", "12.30 *", "14.80")
    assert has_row(output, "seconds per image and process", "0.333", "0.333")
    assert "model fashion_mnist · seed 0 · labels random" in output
    assert contents(runs) == before


def test_the_page_shows_the_first_ids_that_all_runs_hold_and_at_most_eight_by_default(runs, capsys):
    write_run(runs / "c", ids=range(2, 20), first_image=200)
    write_run(runs / "d", ids=range(30), first_image=300)
    for flags, count in (([], 8), (["--num_samples", 5], 5), (["--num_samples", 0], 0)):
        compare(capsys, "c", "d", "--output", "new/PAGE.HTM", *flags)
        expected = [random_png(first + i) for first in (200, 300) for i in range(2, 2 + count)]
        assert images_in(runs / "new/PAGE.HTM") == expected


@pytest.mark.parametrize(
    "line",
    [
        "--output page.html a b",
        "a --output=page.html b",
        "a --num_samples 3 b --output page.html",
    ],
)
def test_folders_may_be_before_and_after_the_flags(line, runs, capsys):
    compare(capsys, *line.split())
    assert "<h1>a and b, side by side</h1>" in (runs / "page.html").read_text()


def test_runs_of_one_name_are_shown_by_their_paths(runs, capsys, monkeypatch):
    write_run(runs / "x" / "a")
    assert has_row(compare(capsys, "a", "x/a", "b"), "a", "x/a", "b")
    monkeypatch.chdir(runs / "a")
    assert has_row(compare(capsys, ".", "../b"), "a", "b")


def test_unfinished_runs_and_those_without_images_are_named(runs, capsys):
    write_run(runs / "c", num_samples=100)
    write_run(runs / "d", ids=(), num_samples=100)
    output = compare(capsys, "c", "d")
    assert "c holds 6 of 100" in output
    assert "d holds 0 of 100" in output
    assert has_row(output, "image size", "8×8", "–")


@pytest.mark.parametrize("settings", [{"seed": 1}, {"labels": "balanced"}])
def test_runs_whose_ids_do_not_correspond_are_shown_with_a_warning(settings, runs, capsys):
    write_run(runs / "c", settings=settings)
    warning = f"differ in {next(iter(settings))}"
    assert warning in compare(capsys, "a", "c")
    assert warning not in compare(capsys, "a", "b")


def test_a_user_s_network_is_shown_by_its_file(runs, capsys):
    write_run(runs / "c", model=None, checkpoint="/far/away/my.safetensors")
    assert has_row(compare(capsys, "a", "c"), "model", "fashion_mnist", "my.safetensors")


@pytest.mark.parametrize("value", ["many", None, [1], {"a": 1}, True, float("nan"), float("inf"), -1, 10**30], ids=str)
def test_metadata_that_are_no_numbers_are_refused(value, runs, capsys):
    for name in ("seconds", "nfe", "num_samples", "batch_size"):
        write_run(runs / name, **{name: value})
        assert exit_code("compare", "a", name) == 2
        assert name in capsys.readouterr().err


def test_markup_in_a_run_is_shown_as_text(runs, capsys):
    write_run(runs / "<b> & 'c'", settings={"labels": MARKUP}, results=[json_result({"<i>fd": 3.0}, reference=MARKUP)])
    compare(capsys, "a", "<b> & 'c'", "--output", "page.html")
    page = (runs / "page.html").read_text()
    assert not re.search("<script|<i>|<b>|\x1b", page)
    assert page.count("&lt;script&gt;") == 2
    output = compare(capsys, "a", "<b> & 'c'")
    assert "\x1b" not in output
    assert "[red]\\x1b[31m" in output


def test_runs_of_sagl_sample_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_grey_unet(tmp_path / "tiny.safetensors")
    flags = ["--checkpoint", "tiny.safetensors", "--num_samples", "3", "--sampler", "ddim", "--respacing", "2"]
    for name, scale in (("plain", 0), ("guided", 0.5)):
        guidance = ["--sag.scale", scale, "--sag.site", "output.0", "--sag.kernel_size", "5"]
        assert exit_code("sample", *flags, *guidance, "--output", name) == 0
    compare(capsys, "plain", "guided", "--output", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert re.search(r"sag\.scale</th><td>0\.0</td><td>0\.5</td>", page)
    assert re.search(r"network evaluations per image</th><td>2</td><td>4</td>", page)
    expected = [sample.pngs[SAMPLES] for name in ("plain", "guided") for sample in iter_samples(tmp_path / name)]
    assert images_in(tmp_path / "page.html") == expected


def test_torch_is_not_imported(runs):
    program = (
        "import sys; from sagl.cli import main; assert main(['compare', 'a', 'b', '--output', 'page.html']) == 0; "
    )
    program += "sys.exit(100 * ('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ("", "run", ""),
        ("a empty", "run", "empty"),
        ("a ./a", "run", "a"),
        ("a --output page.pdf", "output", "page.pdf"),
        ("a --output .html", "output", ".html"),
        ("a --output folder.html --overwrite", "output", "folder.html"),
        ("a --num_samples 3", "num_samples", "output"),
        ("a --output page.html --num_samples -1", "num_samples", "-1"),
        ("a --output page.html --num_samples 7", "num_samples", "7"),
        ("a large --output page.html --num_samples 2", "num_samples", "16×16"),
        ("a later --output page.html --num_samples 2", "num_samples", "2"),
    ],
)
def test_an_impossible_comparison_is_refused(arguments, name, value, runs, capsys):
    (runs / "empty").mkdir()
    (runs / "folder.html").mkdir()
    write_run(runs / "large", image_size=16)
    write_run(runs / "later", ids=range(6, 12))
    refusal(capsys, runs, "compare", *arguments.split(), names=[name, value])


def test_runs_without_common_images_are_compared_without_them(runs, capsys):
    write_run(runs / "large", image_size=16)
    write_run(runs / "later", ids=range(6, 12))
    for other, warning in (("large", "8×8 and 16×16"), ("later", "no id that all runs hold")):
        compare(capsys, "a", other, "--output", "page.html")
        assert warning in (runs / "page.html").read_text()
        assert images_in(runs / "page.html") == []


@pytest.mark.parametrize("name", ["run.json", "evaluation.json", "shards/000004-000005.tar"])
def test_a_damaged_file_of_a_run_is_named(name, runs, capsys):
    file = runs / "b" / name
    file.write_bytes(file.read_bytes()[:-1000] or b"{")
    refusal(capsys, runs, "compare", "a", "b", "--output", "page.html", names=[f"b/{name}"])


def test_a_page_of_sagl_compare_is_replaced_and_another_file_only_on_request(runs, capsys):
    page = runs / "page.html"
    compare(capsys, "a", "--output", page)
    before = page.read_bytes()
    compare(capsys, "a", "b", "--output", page)
    assert page.read_bytes() != before
    page.write_bytes(b"<!doctype html><title>other</title>" + b" " * 200 + b"made by sagl compare")
    refusal(capsys, runs, "compare", "a", "b", "--output", page, names=["--output"])
    compare(capsys, "a", "b", "--output", page, "--overwrite")
    assert images_in(page)
