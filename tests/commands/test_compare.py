import base64
import re
import subprocess
import sys

import numpy as np
import pytest

from sagl.sampling.run_folder import SAMPLES, iter_samples, pixels, png
from tests.helpers.sampled import entry, picture, write_run
from tests.helpers.tiny import contents, exit_code, read_png, write_tiny


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs of six images of other scales, in the folder of the process."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", sag={"scale": 0.3}, evaluations=[entry({"fd": 12.3})])
    write_run(tmp_path / "b", first_picture=100, evaluations=[entry({"fd": 14.8})])
    return tmp_path


def images_in(page):
    """PNG files of an HTML page, in its order."""
    return [base64.b64decode(found) for found in re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text())]


def refusal(capsys, *arguments):
    """The one line that a command is refused with, once nothing has been changed."""
    assert exit_code("compare", *arguments) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.out == ""
    return said.err.removeprefix("sagl compare: ").strip()


# ----------------------------------------------------------------------------------------------------- what it says


def test_without_an_output_the_terminal_shows_what_differs_what_does_not_numbers_and_cost(runs, capsys):
    before = contents(runs)
    assert exit_code("compare", "a", "b") == 0
    out = capsys.readouterr().out
    assert re.search(r"^ +a +b *$", out, re.M)
    assert re.search(r"^ +sag.scale +0.3 +0.0 *$", out, re.M)
    assert re.search(r"^ +Fréchet distance ↓ +12.30 \* +14.80 *$", out, re.M)
    assert re.search(r"^ +images a second a process +3 +3 *$", out, re.M)
    assert "The same in all runs: model fashion_mnist · seed 0 · labels random" in out
    assert "--output FILE.html" in out
    assert contents(runs) == before


def test_the_page_shows_the_first_eight_ids_that_all_runs_hold(runs, capsys):
    write_run(runs / "c", ids=range(2, 20), first_picture=200)
    write_run(runs / "d", ids=range(30), first_picture=300)
    assert exit_code("compare", "c", "d", "--output", "page.html") == 0
    want = [picture(first + i) for first in (200, 300) for i in range(2, 10)]
    assert images_in(runs / "page.html") == want
    assert capsys.readouterr().out == "page.html: 2 runs, 8 images of each run.\n"


def test_as_many_images_are_shown_as_are_asked_for(runs):
    assert exit_code("compare", "a", "b", "--samples", "5", "--output", "page.html") == 0
    assert len(images_in(runs / "page.html")) == 10
    assert exit_code("compare", "a", "b", "--samples", "0", "--output", "page.html") == 0
    assert images_in(runs / "page.html") == []
    assert "no id" not in (runs / "page.html").read_text()


def test_markdown_has_its_images_in_a_file_beside_it(runs):
    assert exit_code("compare", "a", "b", "--output", "page.md", "--samples", "3") == 0
    assert "](page.png)" in (runs / "page.md").read_text()
    rows = read_png(runs / "page.png")
    assert rows.shape == (2 + 2 * 18, 2 + 3 * 18, 3)
    third = pixels(picture(102)).repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(rows[20:36, 38:54], third)


def test_markdown_without_images_has_no_file_beside_it(runs):
    assert exit_code("compare", "a", "b", "--output", "page.md", "--samples", "0") == 0
    assert not (runs / "page.png").exists()
    assert "![" not in (runs / "page.md").read_text()


@pytest.mark.parametrize("name", ["page.html", "page.htm", "PAGE.HTML", "page.md"])
def test_the_same_runs_give_the_same_bytes(name, runs):
    assert exit_code("compare", "a", "b", "--output", f"one/{name}") == 0
    assert exit_code("compare", "a", "b", "--output", f"two/{name}") == 0
    one, two = (sorted((runs / folder).iterdir()) for folder in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_one_run_has_a_table_of_its_own_with_all_its_settings(runs, capsys):
    assert exit_code("compare", "a") == 0
    out = capsys.readouterr().out
    assert re.search(r"^ +sampler +ddim *$", out, re.M)
    assert re.search(r"^ +Fréchet distance ↓ +12.30 *$", out, re.M)
    assert "The same in all runs" not in out
    assert exit_code("compare", "a", "--output", "page.html") == 0
    assert images_in(runs / "page.html") == [picture(i) for i in range(6)]


def test_folders_may_stand_before_and_behind_the_flags(runs):
    for line in (
        ["a", "b", "--output", "page.html"],
        ["--output", "page.html", "a", "b"],
        ["a", "--output=page.html", "b"],
        ["a", "--samples", "3", "b", "--output", "page.html"],
    ):
        assert exit_code("compare", *line) == 0
        assert "<h1>a and b, side by side</h1>" in (runs / "page.html").read_text()


def test_runs_of_one_name_are_called_by_their_whole_paths(runs, capsys):
    write_run(runs / "x" / "a")
    assert exit_code("compare", "a", "x/a", "b") == 0
    assert re.search(r"^ +a +x/a +b *$", capsys.readouterr().out, re.M)


def test_a_run_may_be_the_folder_that_one_is_in(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs / "a")
    assert exit_code("compare", ".", "../b") == 0
    assert re.search(r"^ +a +b *$", capsys.readouterr().out, re.M)


def test_an_unfinished_run_and_one_without_images_are_named(runs, capsys):
    write_run(runs / "c", num_samples=100)
    write_run(runs / "d", ids=(), num_samples=100)
    assert exit_code("compare", "c", "d") == 0
    out = capsys.readouterr().out
    assert "c holds 6 of 100 images so far." in out
    assert "d holds 0 of 100 images so far." in out
    assert re.search(r"^ +pixels of an image +8×8 +– *$", out, re.M)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": 1}, "The runs differ in seed: images of one id begin from other noise."),
        ({"labels": "balanced"}, "The runs differ in labels: images of one id may be of other classes."),
    ],
)
def test_runs_whose_images_do_not_belong_together_say_so(settings, said, runs, capsys):
    write_run(runs / "c", settings=settings)
    assert exit_code("compare", "a", "c") == 0
    assert said in capsys.readouterr().out
    assert exit_code("compare", "a", "b") == 0
    assert said not in capsys.readouterr().out


def test_the_papers_row_is_beside_a_run_of_its_network_and_guidance(runs, capsys):
    sag = {"scale": 0.05, "site": "output.2", "threshold": 1.0, "blur_sigma": 9.0}
    write_run(runs / "cat", model="lsun_cat", sag=sag, evaluations=[entry({"fid": 9.1}, extractor="inception")])
    assert exit_code("compare", "a", "cat") == 0
    out = capsys.readouterr().out
    assert re.search(r"^ +paper, Table 2 +50,000 +250 +6.87 +8.21 +– +0.60 +0.50 *$", out, re.M)
    assert re.search(r"^ +cat \(against fashion_mnist_test\) +20,000 +ddim10 +9.10 ", out, re.M)
    assert "Not like for like" in out


def test_a_network_of_ones_own_is_called_by_its_file(runs, capsys):
    write_run(runs / "c", model=None, checkpoint="/far/away/mine.safetensors")
    assert exit_code("compare", "a", "c") == 0
    assert re.search(r"^ +model +fashion_mnist +mine.safetensors *$", capsys.readouterr().out, re.M)


def test_runs_that_sample_made_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "tiny.safetensors")
    flags = ["--checkpoint", "tiny.safetensors", "--num_samples", "3", "--sampler", "ddim", "--respacing", "2"]
    for name, scale in (("plain", 0), ("guided", 0.5)):
        guidance = ["--sag.scale", scale, "--sag.site", "output.0", "--sag.kernel_size", "5"]
        assert exit_code("sample", *flags, *guidance, "--output", name) == 0
    assert exit_code("compare", "plain", "guided", "--output", "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert re.search(r"sag\.scale</th><td>0\.0</td><td>0\.5</td>", page)
    assert re.search(r"network evaluations an image</th><td>2</td><td>4</td>", page)
    want = [sample.pictures[SAMPLES] for name in ("plain", "guided") for sample in iter_samples(tmp_path / name)]
    assert images_in(tmp_path / "page.html") == want
    capsys.readouterr()


def test_no_torch_is_loaded_but_for_the_picture_of_a_markdown_page(runs):
    def loads_torch(*arguments):
        program = f"import sys; from sagl.cli import main; assert main({list(arguments)!r}) == 0; "
        program += "sys.exit(100 * ('torch' in sys.modules))"
        return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 100

    assert not loads_torch("compare", "a", "b")
    assert not loads_torch("compare", "a", "b", "--output", "page.html")
    assert loads_torch("compare", "a", "b", "--output", "page.md")


# ----------------------------------------------------------------------------------------------- text of settings


NASTY = "<script>alert('x')</script> | **bold** [red]\x1b[31m"


def test_text_of_a_run_does_nothing_in_html(runs):
    write_run(runs / "c", settings={"labels": NASTY}, evaluations=[entry({"<i>fd": 3.0}, reference=NASTY)])
    assert exit_code("compare", "a", "c", "--output", "page.html") == 0
    page = (runs / "page.html").read_text()
    assert "<script" not in page
    assert "<i>" not in page
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; | **bold** [red]\\x1b[31m") == 2


def test_text_of_a_run_does_nothing_in_markdown_and_on_the_terminal(runs, capsys):
    write_run(runs / "c", settings={"labels": NASTY})
    assert exit_code("compare", "a", "c", "--output", "page.md") == 0
    page = (runs / "page.md").read_text()
    assert (
        "| labels | random | \\<script\\>alert('x')\\</script\\> \\| \\*\\*bold\\*\\* \\[red\\]\\\\x1b\\[31m |" in page
    )
    capsys.readouterr()
    assert exit_code("compare", "a", "c") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "**bold** [red]\\x1b[31m" in out


def test_the_name_of_a_folder_is_text_too(runs):
    write_run(runs / "<b> & 'c'")
    assert exit_code("compare", "a", "<b> & 'c'", "--output", "page.html") == 0
    assert "<h1>a and &lt;b&gt; &amp; &#x27;c&#x27;, side by side</h1>" in (runs / "page.html").read_text()


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "run must be given. --help lists all options."),
        (["a", "absent"], "`run` must be a folder that sagl sample wrote, and absent is none."),
        (["a", "a/shards"], "`run` must be a folder that sagl sample wrote, and a/shards is none."),
        (["a", "a/run.json"], "`run` must be a folder that sagl sample wrote, and a/run.json is none."),
        (["a", "b", "a"], "`run` must be different folders, and a is a again. Leave one out."),
        (["a", "b/../a"], "`run` must be different folders, and b/../a is a again. Leave one out."),
        (["a", "--output", "page"], "`output` must be a page, FILE.html or FILE.md, got page. Choose one of these."),
        (["a", "--output", "page.pdf"], "`output` must be a page, FILE.html or FILE.md, got page.pdf. Choose one of"),
        (["a", "--output", ".html"], "`output` must be a page, FILE.html or FILE.md, got .html."),
        (["a", "--output", "a/run.json/page.html"], "`output` a/run.json/page.html cannot be written: "),
        (["a", "--samples", "3"], "`samples` is for a page with images. Add --output FILE.html."),
        (["a", "--output", "page.html", "--samples", "-1"], "`samples` must be at least 0, got -1."),
        (["a", "--output", "page.html", "--samples", "7"], "`samples` must be at most 6, the ids that all runs hold"),
        (["a", "--output", "page.html", "--samples", "few"], "`samples` must be a whole number"),
        (["a", "--pdf"], "there is no option '--pdf'."),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused_in_one_line_and_nothing_is_written(arguments, said, runs, capsys):
    before = contents(runs)
    assert refusal(capsys, *arguments).startswith(said)
    assert contents(runs) == before


def test_images_of_several_sizes_are_named_and_not_shown(runs, capsys):
    write_run(runs / "c", side=16)
    assert exit_code("compare", "a", "c", "--output", "page.html") == 0
    assert capsys.readouterr().out == "page.html: 2 runs, no images.\n"
    page = (runs / "page.html").read_text()
    assert "The images have 8×8 and 16×16 pixels: they are not shown beside each other." in page
    assert "<img" not in page
    said = refusal(capsys, "a", "c", "--output", "page.html", "--samples", "2")
    assert said == "`samples` needs images of one size, got 8×8 and 16×16. Give 0, or leave out a run."


def test_runs_that_share_no_id_are_compared_without_images(runs, capsys):
    write_run(runs / "c", ids=range(6, 12))
    assert exit_code("compare", "a", "c", "--output", "page.html") == 0
    page = (runs / "page.html").read_text()
    assert "There is no id that all runs hold: no images are shown." in page
    assert "<img" not in page
    capsys.readouterr()
    said = refusal(capsys, "a", "c", "--output", "page.html", "--samples", "2")
    assert said == "`samples` must be at most 0, the ids that all runs hold, got 2."


@pytest.mark.parametrize(("name", "text"), [("run.json", "{"), ("run.json", "{}"), ("evaluation.json", "{")])
def test_a_damaged_record_or_evaluation_is_named_and_nothing_is_written(name, text, runs, capsys):
    (runs / "b" / name).write_text(text)
    before = contents(runs)
    said = refusal(capsys, "a", "b", "--output", "page.html")
    assert said.startswith(f"`run` must hold a whole {name}, and b/{name} is damaged. Delete it")
    assert contents(runs) == before


def test_a_damaged_shard_is_named_and_nothing_is_written(runs, capsys):
    shard = runs / "b" / "shards" / "000004-000005.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    before = contents(runs)
    said = refusal(capsys, "a", "b", "--output", "page.html")
    assert said == "b/shards/000004-000005.tar is damaged. The command of its run makes it again."
    assert contents(runs) == before


@pytest.mark.parametrize("value", ["many", None, [1], {"a": 1}, True, float("nan"), float("inf"), -1, 10**30], ids=str)
def test_a_record_whose_numbers_are_none_is_shown_without_them(value, runs, capsys):
    write_run(runs / "c", seconds=value, nfe=value, num_samples=value, versions=value, batch_size=value, model=value)
    assert exit_code("compare", "a", "c") == 0
    assert re.search(r"^ +seconds of all processes +2.0 +– *$", capsys.readouterr().out, re.M)


# ------------------------------------------------------------------------------------------------- other files


@pytest.mark.parametrize("page", ["page.html", "page.md"])
def test_a_page_of_ours_is_made_anew(page, runs):
    assert exit_code("compare", "a", "--output", page) == 0
    before = (runs / page).read_bytes()
    assert exit_code("compare", "a", "b", "--output", page) == 0
    assert (runs / page).read_bytes() != before


@pytest.mark.parametrize(
    ("page", "other", "content"),
    [
        ("page.html", "page.html", b"<!doctype html><title>mine</title>"),
        ("page.md", "page.md", b"# Notes\n" + b"of mine " * 40 + b"on what was made by sagl compare"),
        ("page.md", "page.png", png(np.zeros((4, 4, 3), dtype=np.uint8))),
        ("page.md", "page.png", b""),
    ],
)
def test_a_file_of_somebody_else_is_replaced_only_on_request(page, other, content, runs, capsys):
    (runs / other).write_bytes(content)
    before = contents(runs)
    said = refusal(capsys, "a", "b", "--output", page)
    assert said == (
        f"`output` must be new or a page of sagl compare, and {other} is another file. "
        "Choose another name, or give --overwrite."
    )
    assert contents(runs) == before
    assert exit_code("compare", "a", "b", "--output", page, "--overwrite") == 0
    assert (runs / other).read_bytes() != content


def test_a_folder_is_never_replaced(runs, capsys):
    (runs / "page.html").mkdir()
    for flags in ([], ["--overwrite"]):
        said = refusal(capsys, "a", "--output", "page.html", *flags)
        assert said == "`output` must be a file, and page.html is a folder."


def test_a_page_whose_picture_cannot_be_written_is_not_written_either(runs, capsys):
    (runs / "page.png").mkdir()
    before = contents(runs)
    said = refusal(capsys, "a", "b", "--output", "page.md", "--overwrite")
    assert said.startswith("`output` must be a file, and page.png is a folder.")
    assert contents(runs) == before
    assert not (runs / "page.md").exists()


def test_nothing_in_a_run_is_changed(runs):
    before = contents(runs)
    assert exit_code("compare", "a", "b", "--output", "page.md") == 0
    after = contents(runs)
    assert {path.name for path in after.keys() - before.keys()} == {"page.md", "page.png"}
    assert all(after[path] == before[path] for path in before)


def test_a_run_that_was_not_measured_is_compared_without_numbers(runs, capsys):
    (runs / "b" / "evaluation.json").unlink()
    assert exit_code("compare", "a", "b") == 0
    assert re.search(r"^ +Fréchet distance ↓ +12.30 +– *$", capsys.readouterr().out, re.M)
