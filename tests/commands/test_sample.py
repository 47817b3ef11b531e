import errno
import hashlib
import json
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from sagl.commands._config import parse_sample_config
from sagl.models.checkpoints import build_network, read_checkpoint, write_checkpoint
from sagl.models.memory import estimate_memory
from sagl.sampling import run
from sagl.sampling.exports import colorize_masks
from sagl.sampling.pipeline import build_pipeline, make_labels, run_to_end
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings, SamplerSettings
from sagl.utils import environment
from sagl.utils.images import to_uint8
from tests.helpers.tiny import (
    contents,
    exit_code,
    network_file,
    read_png,
    write_tiny,
    write_tiny_classifier,
    write_training_checkpoint,
)

CHAIN_FLAGS = ["--sampler", "ddim", "--respacing", "4", "--seed", "2"]
SHORT = [*CHAIN_FLAGS, "--batch_size", "4", "--trainer.precision", "32-true"]
TWO = ["--num_samples", "2", *SHORT]
GUIDED = [*SHORT, "--sag.scale", "0.5", "--sag.site", "output.0", "--sag.blur_sigma", "1"]
CHAIN, SAG = SamplerSettings(sampler="ddim", respacing="4"), {"scale": 0.5, "site": "output.0", "blur_sigma": 1.0}


def sample(folder, *flags, network=None):
    """Run the command on a tiny network; the folder that it wrote."""
    network = network or write_tiny(folder.parent / "tiny.safetensors")
    assert exit_code("sample", "--checkpoint", network, "--output", folder, *flags) == 0
    return folder


def arrays_of(folder):
    """Images, (N, H, W, 3), and labels."""
    (npz,) = folder.glob("samples_*.npz")
    with np.load(npz) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def made_by_hand(network_path, ids, **sag):
    """Grey images, (N, 1, H, W) uint8, and masked shares, straight from the recipe."""
    file = read_checkpoint(network_path)
    recipe = build_pipeline(build_network(file), file.diffusion, CHAIN, {"sag": SelfAttentionGuidance(**sag)})
    with torch.inference_mode():
        x, share = run_to_end(recipe.sample_progressive(2, ids, make_labels(RunSettings(seed=2), ids, recipe.network)))
    return to_uint8(x), share


def cell(picture, row, column, side=8):
    """One enlarged image of a grid, made small again: (side, side, 3)."""
    top, left = row * (2 * side + 2) + 2, column * (2 * side + 2) + 2
    return picture[top : top + 2 * side : 2, left : left + 2 * side : 2]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A run of six with --compare."""
    return sample(tmp_path_factory.mktemp("compared") / "run", "--num_samples", "6", "--compare", *GUIDED)


# ---------------------------------------------------------------------------------------------- what is written


def test_a_run_is_shards_a_record_and_views(compared):
    names = {str(path.relative_to(compared)) for path in contents(compared)}
    shards = {"shards/000000-000003.tar", "shards/000004-000005.tar"}
    assert names == {"grid.png", "run.json", "samples_6x8x8x3.npz", *shards, *(f"images/{i:06d}.png" for i in range(6))}


def test_arrays_are_what_public_evaluators_read(compared):
    images, labels = arrays_of(compared)
    assert (images.dtype, images.shape) == (np.uint8, (6, 8, 8, 3))
    assert (labels.dtype, labels.shape) == (np.int64, (6,))
    network = build_network(read_checkpoint(compared.parent / "tiny.safetensors"))
    assert labels.tolist() == make_labels(RunSettings(seed=2), range(6), network).tolist()


def test_grey_images_are_written_as_rgb_with_three_equal_channels(compared):
    images, _ = arrays_of(compared)
    assert (images == images[..., :1]).all()
    assert images.std() > 10


def test_images_are_the_arrays_and_both_are_the_recipe_s(compared):
    images, _ = arrays_of(compared)
    for i, image in enumerate(images):
        assert (read_png(compared / "images" / f"{i:06d}.png") == image).all()
    by_hand, _ = made_by_hand(compared.parent / "tiny.safetensors", [0, 1, 2, 3], **SAG)
    assert (images[:4, ..., 0] == by_hand[:, 0].numpy()).all()


def test_the_record_holds_settings_cost_versions_hash_and_command(compared):
    record, network = record_of(compared), compared.parent / "tiny.safetensors"
    settings = record["settings"]
    assert settings["weights_sha256"] == hashlib.sha256(network.read_bytes()).hexdigest()
    assert record["checkpoint"] == str(network)
    want = {"seed": 2, "sampler": "ddim", "respacing": "4", "eta": 0.0, "compare": True, "precision": "32-true"}
    assert {name: settings[name] for name in want} == want
    assert (record["num_samples"], record["batch_size"]) == (6, 4)
    assert {name: settings["sag"][name] for name in SAG} == SAG
    assert record["nfe"] == 8
    assert record["exports"] == {"grid": 6, "images": 6, "npz": 6}
    assert record["seconds"] > 0
    assert {name: record["versions"][name] for name in ("sagl", "torch")} == {
        "sagl": version("sagl"),
        "torch": version("torch"),
    }
    assert record["command"].startswith(f"sagl sample --checkpoint {network} --output {compared} ")
    assert "--sag.scale 0.5" in record["command"]


def test_compare_makes_three_rows_unguided_guided_and_masks(compared):
    picture = read_png(compared / "grid.png")
    assert picture.shape == (3 * 18 + 2, 6 * 18 + 2, 3)
    network = compared.parent / "tiny.safetensors"
    unguided, _ = made_by_hand(network, [0, 1, 2, 3])
    guided, share = made_by_hand(network, [0, 1, 2, 3], **SAG)
    assert not torch.equal(unguided, guided)
    assert 0.05 < float(share.mean()) < 0.95
    for column in range(4):
        assert (cell(picture, 0, column) == unguided[column, 0, ..., None].numpy()).all()
        assert (cell(picture, 1, column) == guided[column, 0, ..., None].numpy()).all()
        stored = (share * 255).round() / 255
        assert (cell(picture, 2, column) == colorize_masks(stored)[column].permute(1, 2, 0).numpy()).all()


def test_without_compare_the_grid_is_one_row(tmp_path):
    folder = sample(tmp_path / "run", "--num_samples", "3", *GUIDED)
    assert read_png(folder / "grid.png").shape == (18 + 2, 3 * 18 + 2, 3)


def test_a_sample_is_the_same_bytes_in_runs_of_other_lengths_and_beginnings(compared, tmp_path):
    network = compared.parent / "tiny.safetensors"
    images, labels = arrays_of(compared)
    longer, _ = arrays_of(sample(tmp_path / "eight", "--num_samples", "8", *GUIDED, network=network))
    assert (longer[:6] == images).all()
    one, label = arrays_of(sample(tmp_path / "one", "--first_id", "5", "--num_samples", "1", *GUIDED, network=network))
    assert (one[0] == images[5]).all()
    assert label.tolist() == [labels[5]]


def test_colour_images_are_written_as_they_are(tmp_path):
    network = write_tiny(tmp_path / "colour.safetensors", in_channels=3)
    images, _ = arrays_of(sample(tmp_path / "run", "--num_samples", "2", *SHORT, network=network))
    assert images.shape == (2, 8, 8, 3)
    assert (images[..., 0] != images[..., 1]).mean() > 0.5


def test_samples_of_an_unconditional_network_have_the_label_minus_1(tmp_path):
    network = write_tiny(tmp_path / "free.safetensors", num_classes=None, null_label=False)
    assert arrays_of(sample(tmp_path / "run", "--num_samples", "2", *SHORT, network=network))[1].tolist() == [-1, -1]


def test_a_training_checkpoint_gives_its_averaged_or_its_raw_weights(tmp_path):
    checkpoint = write_training_checkpoint(tmp_path / "last.ckpt")
    raw = write_tiny(tmp_path / "raw.safetensors", diffusion=DiffusionSettings(noise_schedule="cosine"))
    runs = {
        "average": sample(tmp_path / "average", "--num_samples", "2", *SHORT, network=checkpoint),
        "raw": sample(tmp_path / "raw", "--num_samples", "2", "--weights", "raw", *SHORT, network=checkpoint),
        "file": sample(tmp_path / "file", "--num_samples", "2", *SHORT, network=raw),
    }
    images = {name: arrays_of(folder)[0] for name, folder in runs.items()}
    assert (images["raw"] == images["file"]).all()
    assert (images["raw"] != images["average"]).any()


# ---------------------------------------------------------------------------------------------- the same again


def test_the_same_command_again_says_so_and_touches_nothing(tmp_path, capsys):
    folder = sample(tmp_path / "run", *TWO)
    before = contents(tmp_path)
    capsys.readouterr()
    assert exit_code("sample", "--checkpoint", tmp_path / "tiny.safetensors", "--output", folder, *TWO) == 0
    assert capsys.readouterr().out == f"{folder} already contains this run.\n"
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seed", "3"], "seed 2, got 3"),
        (["--eta", "0.5", "--num_samples", "3"], "eta 0.0, got 0.5"),
        (["--sag.scale", "0.5", "--sag.site", "middle"], "sag.scale 0.0, got 0.5"),
        (["--trainer.precision", "bf16-true"], "precision '32-true', got 'bf16-true'"),
        (["--batch_size", "3"], "batch_size 4, got 3"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_the_first_that_differs(flags, named, tmp_path, capsys):
    folder = sample(tmp_path / "run", *TWO)
    before = contents(tmp_path)
    capsys.readouterr()
    command = ["sample", "--checkpoint", tmp_path / "tiny.safetensors", "--output", folder, *TWO, *flags]
    assert exit_code(*command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert named in said
    assert contents(tmp_path) == before


def test_other_weights_under_the_same_name_are_refused(tmp_path, capsys):
    folder = sample(tmp_path / "run", *TWO)
    file = network_file()
    changed = {name: tensor * 1.01 for name, tensor in file.state_dict.items()}
    network = tmp_path / "tiny.safetensors"
    write_checkpoint(
        type(file)(model_settings=file.model_settings, diffusion=file.diffusion, state_dict=changed), network
    )
    assert exit_code("sample", "--checkpoint", network, "--output", folder, *TWO) == 2
    assert "weights_sha256" in capsys.readouterr().err


def test_a_run_that_ended_before_its_grid_is_not_taken_for_complete(tmp_path, monkeypatch, capsys):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    command = ["sample", "--checkpoint", write_tiny(tmp_path / "tiny.safetensors"), "--output", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr("sagl.sampling.exports.save_png", full_disk)
        assert exit_code(*command, *TWO) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "run" / "grid.png").exists()
    assert exit_code(*command, *TWO) == 0
    assert (tmp_path / "run" / "grid.png").is_file()


def test_more_samples_continue_a_run_and_give_what_one_run_would_have_given(compared, tmp_path):
    network = compared.parent / "tiny.safetensors"
    whole = sample(tmp_path / "whole", "--num_samples", "7", "--compare", *GUIDED, network=network)
    grown = sample(tmp_path / "grown", "--num_samples", "2", "--compare", *GUIDED, network=network)
    sample(grown, "--num_samples", "7", "--compare", *GUIDED, network=network)
    for name in ("shards/000000-000003.tar", "shards/000004-000006.tar", "samples_7x8x8x3.npz", "grid.png"):
        assert (grown / name).read_bytes() == (whole / name).read_bytes(), name
    assert {path.name for path in contents(grown)} == {path.name for path in contents(whole)}


def test_fewer_samples_are_already_there(compared, capsys):
    before, network = contents(compared), compared.parent / "tiny.safetensors"
    command = ["sample", "--checkpoint", network, "--output", compared, "--num_samples", "3", "--compare", *GUIDED]
    assert exit_code(*command) == 0
    assert "already contains" in capsys.readouterr().out
    assert contents(compared) == before


def test_what_a_stopped_run_holds_can_be_looked_at_before_it_is_whole(tmp_path):
    folder = sample(tmp_path / "run", "--num_samples", "6", *SHORT)
    (folder / "shards" / "000004-000005.tar").unlink()
    sample(folder, "--num_samples", "4", *SHORT)
    assert arrays_of(folder)[0].shape == (4, 8, 8, 3)


def test_a_shard_that_is_missing_or_damaged_is_made_again_and_no_other(tmp_path):
    folder = sample(tmp_path / "run", "--num_samples", "6", *SHORT)
    before = {path.name: data for path, data in contents(folder).items() if path.suffix == ".tar"}
    shard = folder / "shards" / "000004-000005.tar"
    for damage in (lambda: shard.unlink(), lambda: shard.write_bytes(shard.read_bytes()[:-700])):
        damage()
        sample(folder, "--num_samples", "6", *SHORT)
        after = {path.name: data for path, data in contents(folder).items() if path.suffix == ".tar"}
        assert {name: data[0] for name, data in after.items()} == {name: data[0] for name, data in before.items()}
        assert after["000000-000003.tar"] == before["000000-000003.tar"]


def test_the_batch_size_of_a_run_is_kept_where_it_is_not_given_again(tmp_path):
    flags = ["--sampler", "ddim", "--respacing", "2"]
    folder = sample(tmp_path / "run", "--num_samples", "3", "--batch_size", "2", *flags)
    sample(folder, "--num_samples", "5", *flags)
    assert sorted(path.name for path in (folder / "shards").iterdir()) == [
        "000000-000001.tar",
        "000002-000003.tar",
        "000004-000004.tar",
    ]


# ------------------------------------------------------------------------------------------------------- views


def test_large_runs_make_only_the_views_that_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sagl.sampling.run.DEFAULT_EXPORTS_MAX_IMAGES", 1)
    folder = sample(tmp_path / "run", *TWO, "--exports", "npz")
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "samples_2x8x8x3.npz", "shards"]
    sample(folder, *TWO, "--exports", "grid,images")
    assert {"grid.png", "images"} < {path.name for path in folder.iterdir()}


def test_a_strip_shows_estimates_above_masks_as_png_and_gif(tmp_path):
    folder = sample(tmp_path / "run", *TWO, *GUIDED[-6:], "--exports", "strip")
    assert read_png(folder / "strip.png").shape == (2 * 2 * 18 + 2, 4 * 18 + 2, 3)
    with PILImage.open(folder / "strip.gif") as animation:
        assert animation.n_frames == 4


# ------------------------------------------------------------------------------------------- guidances, dry runs


def test_classifier_free_guidance_moves_images_and_costs_a_pass_a_step(tmp_path):
    plain, guided = (sample(tmp_path / name, *TWO, *flags) for name, flags in (("0", []), ("1", ["--cfg.scale", "2"])))
    assert (arrays_of(plain)[0] != arrays_of(guided)[0]).any()
    assert (record_of(plain)["nfe"], record_of(guided)["nfe"]) == (4, 8)


def test_a_classifier_guides_together_with_sag(tmp_path):
    classifier = write_tiny_classifier(tmp_path / "classifier.safetensors")
    flags = ["--classifier.checkpoint", str(classifier), "--classifier.scale", "5"]
    folders = [sample(tmp_path / str(i), *TWO, *more) for i, more in enumerate(([], flags, [*flags, *GUIDED[-6:]]))]
    images = [arrays_of(folder)[0] for folder in folders]
    assert (images[0] != images[1]).any()
    assert (images[1] != images[2]).any()
    assert [record_of(folder)["nfe"] for folder in folders] == [4, 4, 8]


@pytest.mark.parametrize(("changes", "named"), [({"image_size": 16}, "16x16"), ({"num_classes": 4}, "4 classes")])
def test_a_classifier_of_another_size_or_other_classes_is_refused(changes, named, tmp_path, capsys):
    classifier = write_tiny_classifier(tmp_path / "classifier.safetensors", **changes)
    network = write_tiny(tmp_path / "tiny.safetensors")
    flags = ["--classifier.checkpoint", classifier, "--classifier.scale", "5", *TWO]
    assert exit_code("sample", "--checkpoint", network, "--output", tmp_path / "run", *flags) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_a_run_costs_and_writes_nothing(tmp_path, capsys):
    network = write_tiny(tmp_path / "tiny.safetensors")
    flags = ["--num_samples", "6", *GUIDED, "--dry_run"]
    assert exit_code("sample", "--checkpoint", network, "--output", tmp_path / "run", *flags) == 0
    said = capsys.readouterr().out
    assert "6 images, 8 network evaluations each, 2 batches of 4 to do: about " in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_gives_nearly_the_same_images(precision, compared, tmp_path):
    network = compared.parent / "tiny.safetensors"
    folder = sample(tmp_path / "half", "--num_samples", "4", *SHORT, "--trainer.precision", precision, network=network)
    full = sample(tmp_path / "full", "--num_samples", "4", *SHORT, network=network)
    difference = np.abs(arrays_of(folder)[0].astype(int) - arrays_of(full)[0])
    assert difference.max() > 0
    assert difference.mean() < 3


# ----------------------------------------------------------------------------------- left to the machine


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16-true"), (False, "32-true")])
def test_choices_are_said_once_and_kept_by_the_folder(fast, precision, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(environment, "has_fast_bfloat16", lambda: fast)
    folder = sample(tmp_path / "run", "--num_samples", "3", *CHAIN_FLAGS)
    record, said = record_of(folder), capsys.readouterr().out
    assert (record["settings"]["precision"], record["batch_size"]) == (precision, 3)
    assert said.count("Chosen for this machine") == 1
    assert f"--trainer.precision {precision} --batch_size 3 OMP_NUM_THREADS={torch.get_num_threads()}\n" in said
    monkeypatch.setattr(environment, "has_fast_bfloat16", lambda: not fast)
    network = tmp_path / "tiny.safetensors"
    assert exit_code("sample", "--checkpoint", network, "--output", folder, "--num_samples", "5", *CHAIN_FLAGS) == 0
    assert record_of(folder)["settings"]["precision"] == precision
    by_one_machine = sample(
        tmp_path / "again",
        "--num_samples",
        "5",
        *CHAIN_FLAGS,
        "--batch_size",
        "3",
        "--trainer.precision",
        precision,
        network=network,
    )
    assert (arrays_of(folder)[0] == arrays_of(by_one_machine)[0]).all()


def test_a_network_is_compiled_where_that_is_asked_for_and_the_run_says_so(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: calls.append(options))
    plain = sample(tmp_path / "plain", *TWO)
    assert calls == []
    compiled = sample(tmp_path / "compiled", *TWO, "--trainer.compile", "true", network=tmp_path / "tiny.safetensors")
    assert calls == [{"dynamic": False}]
    assert record_of(compiled)["settings"].pop("compile") is True
    assert "compile" not in record_of(plain)["settings"]


def test_no_more_images_at_once_than_fit_into_memory(tmp_path, monkeypatch):
    network = write_tiny(tmp_path / "tiny.safetensors")
    weights, each = estimate_memory(read_checkpoint(network).model_settings, torch.float32)
    monkeypatch.setattr(run, "available_bytes", lambda _: (weights + 5 * each) * 4 // 3 + 8)
    folder = sample(
        tmp_path / "run", "--num_samples", "9", *CHAIN_FLAGS, "--trainer.precision", "32-true", network=network
    )
    assert record_of(folder)["batch_size"] == 5


# ------------------------------------------------------------------------------------------------------ advice


ADVICE = {"sampler": "ddim", "respacing": "3", "labels": "balanced", "sag": {"scale": 0.4, "site": "output.1"}}


def test_the_settings_that_a_file_recommends_are_used(tmp_path):
    network = write_tiny(tmp_path / "advised.safetensors", recommended=ADVICE)
    folder = sample(tmp_path / "run", "--num_samples", "4", network=network)
    record = record_of(folder)
    settings = record["settings"]
    assert {name: settings[name] for name in ("sampler", "respacing", "labels")} == {
        name: ADVICE[name] for name in ("sampler", "respacing", "labels")
    }
    assert settings["sag"] == {**json.loads(json.dumps(SelfAttentionGuidance().__dict__)), **ADVICE["sag"]}
    assert record["nfe"] == 6
    assert arrays_of(folder)[1].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("flags", "got"),
    [
        (["--sag.scale", "0.1"], {"sag": (0.1, "output.1"), "respacing": "3"}),
        (["--respacing", "5"], {"sag": (0.4, "output.1"), "respacing": "5"}),
        (["--sag.scale", "0"], {"sag": (0.0, "output.1"), "respacing": "3"}),
    ],
)
def test_a_flag_goes_before_what_the_file_recommends_and_leaves_the_rest(flags, got, tmp_path):
    network = write_tiny(tmp_path / "advised.safetensors", recommended=ADVICE)
    request = parse_sample_config(["--checkpoint", str(network), *flags])
    assert (request.guidances["sag"].scale, request.guidances["sag"].site) == got["sag"]
    assert request.sampler.respacing == got["respacing"]
    assert request.sampler.sampler == "ddim"


def test_without_advice_the_defaults_are_the_fields_own(tmp_path):
    request = parse_sample_config(["--checkpoint", str(write_tiny(tmp_path / "plain.safetensors"))])
    assert (request.samples, request.sampler, request.guidances["sag"]) == (
        RunSettings(),
        SamplerSettings(),
        SelfAttentionGuidance(),
    )


def test_advice_that_names_no_setting_is_refused_in_one_line(tmp_path, capsys):
    network = write_tiny(tmp_path / "odd.safetensors", recommended={"sag": {"strength": 3}})
    assert exit_code("sample", "--checkpoint", network, "--output", tmp_path / "run", *SHORT) == 2
    assert "strength" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- refusals


def test_compare_without_guidance_is_refused(tmp_path, capsys):
    network = write_tiny(tmp_path / "tiny.safetensors")
    command = ["sample", "--checkpoint", network, "--output", tmp_path / "run", "--compare", "--sag.scale", "0"]
    assert exit_code(*command) == 2
    assert "--compare" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_file_is_refused_before_anything_is_drawn(tmp_path, capsys):
    network, taken = write_tiny(tmp_path / "tiny.safetensors"), tmp_path / "notes.txt"
    taken.write_text("mine")
    assert exit_code("sample", "--checkpoint", network, "--output", taken, "--num_samples", "1", *SHORT) == 2
    assert "--output" in capsys.readouterr().err
    assert taken.read_text() == "mine"


def test_the_default_kernel_is_shrunk_to_the_image_and_that_is_said(tmp_path, capsys):
    sample(tmp_path / "run", "--num_samples", "1", *GUIDED)
    assert "Blur kernel 15: the largest that fits 8x8 images." in capsys.readouterr().out


def test_a_kernel_that_was_given_is_not_spoken_of(tmp_path, capsys):
    sample(tmp_path / "run", "--num_samples", "1", *GUIDED, "--sag.kernel_size", "5")
    assert "Blur kernel" not in capsys.readouterr().out
