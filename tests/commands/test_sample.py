import errno
import hashlib
import json
import re
import shutil
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np
import pytest
import torch

import sagl
from sagl.data.transforms import decode_image
from sagl.models.checkpoints import build_network, read_checkpoint, write_checkpoint
from sagl.models.memory import estimate_memory
from sagl.sampling import choices, run
from sagl.sampling.pipeline import build_pipeline, make_labels
from sagl.sampling.run_folder import encode_png, iter_samples
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings, SamplerSettings
from sagl.utils import environment
from sagl.utils.images import to_rgb, to_uint8
from tests.helpers.commands import exit_code, refusal
from tests.helpers.files import contents
from tests.helpers.networks import grey_weights, write_grey_unet, write_training_checkpoint

SAMPLER = ["--sampler", "ddim", "--respacing", "4", "--seed", "2"]
SHORT = [*SAMPLER, "--batch_size", "4", "--trainer.precision", "32-true"]
TWO = ["--num_samples", "2", *SHORT]
GUIDED = [*SHORT, "--sag.scale", "0.5", "--sag.site", "output.0", "--sag.blur_sigma", "1"]
SAG = {"scale": 0.5, "site": "output.0", "blur_sigma": 1.0}


def sample(folder, *flags, network=None):
    """Run the command on a tiny network; return its run folder."""
    network = network or write_grey_unet(folder.parent / "tiny.safetensors")
    assert exit_code("sample", "--checkpoint", network, "--output", folder, *flags) == 0
    return folder


def arrays_of(folder):
    """Return images, (N, H, W, 3), and labels."""
    (npz,) = folder.glob("samples_*.npz")
    with np.load(npz) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def metadata_of(folder):
    return json.loads((folder / "run.json").read_text())


def shards_of(folder):
    """Return bytes and times of the shards by name."""
    return {path.name: data for path, data in contents(folder).items() if path.suffix == ".tar"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a run of six images with --compare."""
    return sample(tmp_path_factory.mktemp("compared") / "run", "--num_samples", "6", "--compare", *GUIDED)


@pytest.fixture(scope="module")
def tiny(compared):
    """The network of that run."""
    return compared.parent / "tiny.safetensors"


# ------------------------------------------------------------------------------------------------------- output


def test_a_run_consists_of_shards_metadata_and_exports(compared):
    names = {str(path.relative_to(compared)) for path in contents(compared)}
    shards = {"shards/000000-000003.tar", "shards/000004-000005.tar"}
    assert names == {"grid.png", "run.json", "samples_6x8x8x3.npz", *shards, *(f"images/{i:06d}.png" for i in range(6))}


def test_samples_unguided_images_and_masks_are_those_of_the_pipeline(compared, tiny):
    ids, file = [0, 1, 2, 3], read_checkpoint(tiny)
    network, sampler = build_network(file), SamplerSettings(sampler="ddim", respacing="4")
    pipeline = build_pipeline(network, file.diffusion, sampler, {"sag": SelfAttentionGuidance(**SAG)})
    labels = make_labels(RunSettings(seed=2), ids, network)
    with torch.inference_mode():
        images, mask_frequency = pipeline.sample(2, ids, labels)
        unguided, _ = pipeline.unguided.sample(2, ids, labels)
    assert not torch.equal(to_uint8(unguided), to_uint8(images))
    assert 0.05 < float(mask_frequency.mean()) < 0.95
    masks = (mask_frequency * 255).round().to(torch.uint8)
    rows = {"samples": to_uint8(images), "unguided": to_uint8(unguided), "masks": masks}
    for k, actual in enumerate(iter_samples(compared, 4)):
        expected = {name: encode_png(to_rgb(row)[k].permute(1, 2, 0).numpy()) for name, row in rows.items()}
        assert (actual.id, actual.label, actual.pngs) == (k, int(labels[k]), expected)


def test_the_metadata_hold_settings_cost_versions_digest_and_command(compared, tiny):
    metadata = metadata_of(compared)
    settings = metadata["settings"]
    assert settings["weights_sha256"] == hashlib.sha256(tiny.read_bytes()).hexdigest()
    assert metadata["checkpoint"] == str(tiny)
    expected = {"seed": 2, "sampler": "ddim", "respacing": "4", "eta": 0.0, "compare": True, "precision": "32-true"}
    assert {name: settings[name] for name in expected} == expected
    assert (metadata["num_samples"], metadata["batch_size"], metadata["nfe"]) == (6, 4, 8)
    assert {name: settings["sag"][name] for name in SAG} == SAG
    assert metadata["exports"] == {"grid": 6, "images": 6, "npz": 6}
    assert metadata["seconds"] > 0
    versions = metadata["versions"]
    assert (versions["sagl"], versions["torch"]) == (sagl.__version__, version("torch"))
    assert metadata["command"].startswith(f"sagl sample --checkpoint {tiny} --output {compared} ")


def test_the_share_of_masked_pixels_is_recorded_and_printed(compared, tiny, tmp_path, capsys):
    masks = [decode_image(image.pngs["masks"], 1) for image in iter_samples(compared, 6)]
    shares = [np.mean(masks[ids]) / 255 for ids in (slice(0, 4), slice(4, 6))]  # of the two batches
    assert metadata_of(compared)["mask_share"] == pytest.approx(np.mean(shares), abs=1 / 255)
    capsys.readouterr()
    empty = sample(tmp_path / "empty", *TWO, *GUIDED, "--sag.threshold", "1000", network=tiny)
    assert metadata_of(empty)["mask_share"] == 0
    assert "0.0% of the pixels. SAG changed nothing: lower --sag.threshold." in capsys.readouterr().out


def test_a_run_may_begin_at_any_sample(compared, tiny, tmp_path):
    folder = sample(tmp_path / "one", "--first_id", "5", "--num_samples", "1", *GUIDED, network=tiny)
    for last, all_samples in zip(arrays_of(folder), arrays_of(compared), strict=True):
        assert (last[0] == all_samples[5]).all()


def test_samples_of_an_unconditional_network_have_the_label_minus_1(tmp_path):
    network = write_grey_unet(tmp_path / "tiny.safetensors", num_classes=None, null_label=False)
    assert arrays_of(sample(tmp_path / "run", *TWO, network=network))[1].tolist() == [-1, -1]


def test_the_requested_weights_of_a_training_checkpoint_are_used(tmp_path):
    checkpoint = write_training_checkpoint(tmp_path / "last.ckpt")
    tiny = write_grey_unet(tmp_path / "raw.safetensors", diffusion=DiffusionSettings(noise_schedule="cosine"))
    requests = {"ema": (checkpoint, []), "raw": (checkpoint, ["--weights", "raw"]), "file": (tiny, [])}
    images = {
        name: arrays_of(sample(tmp_path / name, *TWO, *flags, network=network))[0]
        for name, (network, flags) in requests.items()
    }
    assert (images["raw"] == images["file"]).all()
    assert (images["raw"] != images["ema"]).any()


# ---------------------------------------------------------------------------------------- the same folder again


@pytest.mark.parametrize("num_samples", ["6", "3"])
def test_a_run_that_is_complete_is_reported_and_not_changed(num_samples, compared, tiny, capsys):
    before = contents(compared)
    sample(compared, "--num_samples", num_samples, "--compare", *GUIDED, network=tiny)
    assert capsys.readouterr().out == f"{compared} already contains this run.\n"
    assert contents(compared) == before


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--eta", "0.5", "--num_samples", "3"], ["eta 0.0, got 0.5"]),
        (["--sag.threshold", "2"], ["sag.threshold 1.0, got 2.0"]),
        (["--trainer.precision", "bf16-true"], ["precision '32-true', got 'bf16-true'"]),
        (["--batch_size", "3"], ["batch_size", "4", "got 3"]),
        (["--checkpoint", "other.safetensors"], ["weights_sha256"]),
    ],
)
def test_a_run_of_other_settings_is_refused_by_the_first_that_differs(
    flags, parts, compared, tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    file = grey_weights()
    changed = {name: tensor * 1.01 for name, tensor in file.state_dict.items()}
    other = type(file)(model_settings=file.model_settings, diffusion=file.diffusion, state_dict=changed)
    write_checkpoint(other, tmp_path / "other.safetensors")
    command = ["sample", "--checkpoint", tiny, "--output", compared, "--num_samples", "6", "--compare", *GUIDED]
    refusal(capsys, compared, *command, *flags, names=["--output", *parts])


def test_a_run_is_not_continued_with_another_file_of_a_network_that_guides_it(tiny, tmp_path, capsys):
    weak = write_grey_unet(tmp_path / "weak.safetensors", num_res_blocks=2)
    flags = [*SHORT, "--autoguidance.scale", "1", "--autoguidance.checkpoint", weak]
    run = sample(tmp_path / "run", "--num_samples", "2", *flags, network=tiny)
    old = hashlib.sha256(weak.read_bytes()).hexdigest()
    assert metadata_of(run)["settings"]["guidance_sha256"] == {"autoguidance.checkpoint": old}
    sample(run, "--num_samples", "2", *flags, network=tiny)
    write_grey_unet(weak)
    command = ["sample", "--checkpoint", tiny, "--output", run, "--num_samples", "6", *flags]
    refusal(capsys, run, *command, names=["--output", "autoguidance.checkpoint", old])


def test_a_run_that_appears_while_the_command_waits_for_the_folder_is_not_changed(
    compared, tiny, tmp_path, monkeypatch
):
    @contextmanager
    def wait_for_another_command(folder):
        shutil.copytree(compared, folder)
        yield

    monkeypatch.setattr("sagl.commands.sample.lock_run", wait_for_another_command)
    assert exit_code("sample", "--checkpoint", tiny, "--output", tmp_path / "run", *TWO, "--seed", "3") == 2
    shards = sorted(path.read_bytes() for path in (compared / "shards").iterdir())
    assert sorted(path.read_bytes() for path in (tmp_path / "run" / "shards").iterdir()) == shards


@pytest.mark.parametrize("flags", [[], ["--dry_run"]])
def test_a_weaker_network_that_needs_labels_is_refused_before_a_run_without_them(flags, tiny, tmp_path, capsys):
    weak = write_grey_unet(tmp_path / "weak.safetensors", null_label=False)
    command = ["sample", "--checkpoint", tiny, "--output", tmp_path / "run", *TWO, "--labels", "null", *flags]
    names = ["--autoguidance.checkpoint", "--labels"]
    refusal(capsys, tmp_path, *command, "--autoguidance.scale", 1, "--autoguidance.checkpoint", weak, names=names)


def test_a_run_without_its_last_exports_is_not_complete(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    network = write_grey_unet(tmp_path / "tiny.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("sagl.sampling.exports.save_png", full_disk)
        assert exit_code("sample", "--checkpoint", network, "--output", tmp_path / "run", *TWO) == 2
    assert not (tmp_path / "run" / "grid.png").exists()
    sample(tmp_path / "run", *TWO, network=network)
    assert (tmp_path / "run" / "grid.png").is_file()


def test_more_samples_continue_a_run_to_the_bytes_of_a_single_one(compared, tiny, tmp_path):
    for count in ("2", "6"):
        folder = sample(tmp_path / "run", "--num_samples", count, "--compare", *GUIDED, network=tiny)
    names = {str(path.relative_to(compared)) for path in contents(compared)}
    assert {str(path.relative_to(folder)) for path in contents(folder)} == names
    for name in names - {"run.json"}:
        assert (folder / name).read_bytes() == (compared / name).read_bytes(), name


def test_only_shards_that_are_missing_or_damaged_are_sampled_again(tiny, tmp_path):
    folder = sample(tmp_path / "run", "--num_samples", "6", *SHORT, network=tiny)
    before, shard = shards_of(folder), folder / "shards" / "000004-000005.tar"
    shard.unlink()
    sample(folder, "--num_samples", "4", *SHORT, network=tiny)
    assert arrays_of(folder)[0].shape == (4, 8, 8, 3)
    for damage in (lambda: None, lambda: shard.write_bytes(shard.read_bytes()[:-700])):
        damage()
        sample(folder, "--num_samples", "6", *SHORT, network=tiny)
        after = shards_of(folder)
        assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
        assert after["000000-000003.tar"] == before["000000-000003.tar"]


def test_the_batch_size_of_a_run_remains_unless_it_is_set(tiny, tmp_path):
    folder = sample(tmp_path / "run", "--num_samples", "3", "--batch_size", "2", *SAMPLER, network=tiny)
    sample(folder, "--num_samples", "5", *SAMPLER, network=tiny)
    assert sorted(shards_of(folder)) == ["000000-000001.tar", "000002-000003.tar", "000004-000004.tar"]


# ------------------------------------------------------------------------------------------- exports and dry runs


@pytest.mark.parametrize("pattern", ["grid.png", "images/*", "images/000003.png", "samples_6x8x8x3.npz"])
def test_the_same_command_writes_a_deleted_export_again(pattern, compared, tiny, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "run")
    for path in folder.glob(pattern):
        path.unlink()
    sample(folder, "--num_samples", "6", "--compare", *GUIDED, network=tiny)
    names = [{str(path.relative_to(run)) for path in contents(run)} for run in (folder, compared)]
    assert names[0] == names[1]


def test_an_export_alone_changes_neither_the_recorded_command_nor_the_versions(compared, tiny, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "run")
    metadata = metadata_of(folder)
    (folder / "grid.png").unlink()
    sample(folder, "--num_samples", "2", "--compare", *GUIDED, network=tiny)
    assert metadata_of(folder) == metadata


def test_other_versions_of_libraries_are_reported_when_a_run_is_continued(tiny, tmp_path, capsys, monkeypatch):
    folder = sample(tmp_path / "run", *TWO, network=tiny)
    monkeypatch.setattr(run, "version", lambda name: "9.9" if name == "torch" else version(name))
    capsys.readouterr()
    sample(folder, "--num_samples", "6", *SHORT, network=tiny)
    assert f"torch {version('torch')} (now 9.9)" in capsys.readouterr().out
    assert metadata_of(folder)["versions"]["torch"] == "9.9"


def test_a_shard_that_a_longer_one_contains_is_removed_even_if_nothing_is_missing(compared, tiny, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "run")
    shutil.copy(folder / "shards/000004-000005.tar", folder / "shards/000004-000004.tar")
    sample(folder, "--num_samples", "6", "--compare", *GUIDED, network=tiny)
    assert set(shards_of(folder)) == set(shards_of(compared))


def test_large_runs_have_only_the_requested_exports(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sagl.sampling.run.DEFAULT_EXPORTS_MAX_IMAGES", 1)
    folder = sample(tmp_path / "run", *TWO, "--exports", "npz", network=tiny)
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "samples_2x8x8x3.npz", "shards"]
    sample(folder, *TWO, "--exports", "grid,images,strip", network=tiny)
    assert {"grid.png", "images", "strip.png", "strip.gif"} < {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_dry_run_prints_the_cost_and_writes_nothing(processes, tiny, tmp_path, capsys):
    command = ["sample", "--checkpoint", tiny, "--output", tmp_path / "run", "--num_samples", "6", *GUIDED]
    assert exit_code(*command, "--dry_run", "--trainer.accelerator", "cpu", "--trainer.devices", processes) == 0
    output = capsys.readouterr().out
    assert "6 images, 8 network evaluations each, 2 batches of 4" in output
    total, evaluation = map(float, re.search(r"about ([\d.]+) s \(([\d.]+) s per", output).groups())
    assert total == pytest.approx(evaluation * 8 * 2 / processes, abs=0.1)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ choices for a machine


def test_images_that_are_computed_in_addition_are_announced(tiny, tmp_path, capsys):
    sample(tmp_path / "run", "--first_id", "3", *TWO, network=tiny)
    assert "multiples of --batch_size 4, so 8 images are computed for 2." in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_gives_nearly_the_same_images(precision, compared, tiny, tmp_path):
    folder = sample(tmp_path / "half", "--num_samples", "4", *GUIDED, "--trainer.precision", precision, network=tiny)
    difference = np.abs(arrays_of(folder)[0].astype(int) - arrays_of(compared)[0][:4])
    assert difference.max() > 0
    assert difference.mean() < 3


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16-true"), (False, "32-true")])
def test_choices_are_printed_once_and_remain_those_of_the_run(fast, precision, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(environment, "has_fast_bfloat16", lambda: fast)
    folder = sample(tmp_path / "run", "--num_samples", "3", *SAMPLER, network=tiny)
    assert (metadata_of(folder)["settings"]["precision"], metadata_of(folder)["batch_size"]) == (precision, 3)
    choices = ["--trainer.precision", precision, "--batch_size", "3"]
    assert capsys.readouterr().out.count(" ".join([*choices, f"OMP_NUM_THREADS={torch.get_num_threads()}\n"])) == 1
    monkeypatch.setattr(environment, "has_fast_bfloat16", lambda: not fast)
    sample(folder, "--num_samples", "5", *SAMPLER, network=tiny)
    expected = sample(tmp_path / "explicit", "--num_samples", "5", *SAMPLER, *choices, network=tiny)
    assert shards_of(folder).keys() == shards_of(expected).keys()
    assert (arrays_of(folder)[0] == arrays_of(expected)[0]).all()


def test_a_network_is_compiled_on_request_and_the_metadata_say_so(tiny, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: calls.append(options))
    assert "compile" not in metadata_of(sample(tmp_path / "plain", *TWO, network=tiny))["settings"]
    assert calls == []
    compiled = sample(tmp_path / "compiled", *TWO, "--trainer.compile", "true", network=tiny)
    assert calls == [{"dynamic": False}]
    assert metadata_of(compiled)["settings"]["compile"] is True


def test_a_batch_is_no_larger_than_the_memory_allows(tiny, tmp_path, monkeypatch):
    weights, image = estimate_memory(read_checkpoint(tiny).model_settings, torch.float32)
    monkeypatch.setattr(choices, "available_bytes", lambda _: (weights + 5 * image) * 4 // 3 + 8)
    flags = ["--num_samples", "9", *SAMPLER, "--trainer.precision", "32-true"]
    assert metadata_of(sample(tmp_path / "run", *flags, network=tiny))["batch_size"] == 5


def test_a_blur_kernel_is_printed_only_if_it_was_chosen(tiny, tmp_path, capsys):
    sample(tmp_path / "default", "--num_samples", "1", *GUIDED, network=tiny)
    assert re.search(r"kernel 15.* 8x8", capsys.readouterr().out)
    sample(tmp_path / "explicit", "--num_samples", "1", *GUIDED, "--sag.kernel_size", "5", network=tiny)
    assert "Blur kernel" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- recommended settings


RECOMMENDED = {"sampler": "ddim", "respacing": "3", "labels": "balanced", "sag": {"scale": 0.4, "site": "output.1"}}


def test_recommended_settings_of_a_file_are_used(tmp_path):
    network = write_grey_unet(tmp_path / "tiny.safetensors", recommended=RECOMMENDED)
    folder = sample(tmp_path / "run", "--num_samples", "4", network=network)
    settings = metadata_of(folder)["settings"]
    for name, value in RECOMMENDED.items():
        assert settings[name] == (
            json.loads(json.dumps({**vars(SelfAttentionGuidance()), **value})) if name == "sag" else value
        )
    assert metadata_of(folder)["nfe"] == 6
    assert arrays_of(folder)[1].tolist() == [0, 1, 2, 0]
