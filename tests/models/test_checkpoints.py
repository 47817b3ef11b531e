import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sagl.errors import UserError
from sagl.models.checkpoints import (
    build_classifier,
    build_network,
    cast_weights,
    in_dtype,
    read_checkpoint,
    write_checkpoint,
)
from sagl.models.pickles import load_training_checkpoint
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.errors import refused
from tests.helpers.networks import (
    grey_classifier,
    grey_unet,
    grey_weights,
    write_grey_classifier,
    write_grey_unet,
    write_training_checkpoint,
)

COSINE = DiffusionSettings(noise_schedule="cosine", variance="learned_range", num_timesteps=400)
INPUTS = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 900])
LABELS = torch.tensor([0, 2])


def changed(checkpoint, tensors):
    """The checkpoint with some tensors replaced; None removes one."""
    state_dict = {name: tensor for name, tensor in {**checkpoint.state_dict, **tensors}.items() if tensor is not None}
    return replace(checkpoint, state_dict=state_dict)


def rewrite(path, **content):
    """Replace some entries of a training checkpoint; None removes one."""
    content = {**torch.load(path, weights_only=True), **content}
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def with_settings(path, **settings):
    """Replace some hyperparameters of a training checkpoint."""
    return rewrite(path, hyper_parameters=torch.load(path, weights_only=True)["hyper_parameters"] | settings)


@pytest.fixture
def training(tmp_path):
    return write_training_checkpoint(tmp_path / "last.ckpt")


@pytest.fixture
def plain(tmp_path):
    """A state dict without settings, contiguous as the released ones are."""
    path = tmp_path / "released.pt"
    torch.save({name: tensor.contiguous() for name, tensor in grey_unet().state_dict().items()}, path)
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_channels": 64, "channel_mult": (0.5, 1.5), "attention_resolutions": (4,)},
        {"num_head_channels": 16, "num_heads_upsample": 2},
        {"attention_resolutions": ()},
        {"num_classes": None, "null_label": False},
    ],
)
def test_float32_weights_and_settings_come_back_unchanged(settings, tmp_path):
    recommended = {"sampler": "ddim", "sag": {"scale": 0.3, "interval": [0.25, 1]}}
    written = grey_weights(recommended=recommended, diffusion=COSINE, **settings)
    write_checkpoint(written, tmp_path / "a.safetensors")
    read = read_checkpoint(tmp_path / "a.safetensors")
    assert (read.model_settings, read.diffusion, read.recommended) == (written.model_settings, COSINE, recommended)
    assert read.state_dict.keys() == written.state_dict.keys()
    assert all(torch.equal(read.state_dict[name], tensor) for name, tensor in written.state_dict.items())


def test_float16_weights_come_back_close_and_are_used_in_float32(tmp_path):
    write_checkpoint(in_dtype(grey_weights(), torch.float16), tmp_path / "a.safetensors")
    read, network = read_checkpoint(tmp_path / "a.safetensors"), grey_unet()
    assert {tensor.dtype for tensor in read.state_dict.values()} == {torch.float16}
    built = build_network(read)
    assert {(parameter.dtype, parameter.requires_grad) for parameter in built.parameters()} == {(torch.float32, False)}
    assert not built.training
    expected = network(*INPUTS, LABELS).out
    assert 0 < float((built(*INPUTS, LABELS).out - expected).abs().max() / expected.abs().max()) < 5e-3


def test_a_classifier_comes_back_unchanged_and_is_not_a_diffusion_model(tmp_path):
    read = read_checkpoint(write_grey_classifier(tmp_path / "c.safetensors"))
    assert torch.equal(build_classifier(read)(*INPUTS), grey_classifier()(*INPUTS))
    with pytest.raises(UserError, match=r"`checkpoint` .*classifier"):
        build_network(read)
    with pytest.raises(UserError, match=r"`classifier\.checkpoint` .*diffusion model"):
        build_classifier(read_checkpoint(write_grey_unet(tmp_path / "a.safetensors")))


@pytest.mark.parametrize("error", [OSError("no space left"), SafetensorError("no space left (os error 28)")])
def test_a_file_is_written_completely_or_not_at_all(error, tmp_path, monkeypatch):
    target = write_grey_unet(tmp_path / "a.safetensors")
    before = target.read_bytes()

    def full_disk(state_dict, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("sagl.models.checkpoints.save_file", full_disk)
    with pytest.raises(UserError, match=r"`target` .*a\.safetensors.*no space"):
        write_checkpoint(grey_weights(), target)
    assert (target.read_bytes(), list(tmp_path.iterdir())) == (before, [target])


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({"out.2.weight": None}, ("1 parameters", "out.2.weight", "(2, 32, 3, 3)")),
        ({"out.2.bias": torch.zeros(3)}, ("1 parameters", "out.2.bias", "(2,)", "(3,)")),
        ({"extra": torch.zeros(4)}, ("1 parameters", "extra", "(4,)")),
        ({"extra": torch.zeros(4), "out.2.weight": None}, ("2 parameters", "extra: ", "; out.2.weight: ")),
        ({f"extra.{n}": torch.zeros(4) for n in range(9)}, ("9 parameters", "extra.4: ")),
    ],
)
def test_names_and_shapes_that_do_not_match_are_counted_and_listed_up_to_five(tensors, parts):
    with pytest.raises(UserError) as error:
        build_network(changed(grey_weights(), tensors))
    assert [part for part in ("`checkpoint`", *parts) if part not in str(error.value)] == []
    assert str(error.value).count("; ") == min(5, len(tensors)) - 1


def test_settings_that_contradict_those_of_the_file_are_refused(tmp_path):
    path, settings = write_grey_unet(tmp_path / "a.safetensors"), grey_unet().settings
    assert read_checkpoint(path, settings=replace(settings, dropout=0.3)).model_settings == settings
    with pytest.raises(UserError, match="num_heads 4, not 2"):
        read_checkpoint(path, settings=replace(settings, num_heads=2))


@pytest.mark.parametrize(
    ("weights", "factor"), [("ema", 0.5), ("ema:0.999", 0.5), ("ema:0.99", 0.25), ("raw", 1.0), (None, 0.5)]
)
def test_a_training_checkpoint_has_averaged_and_raw_weights(weights, factor, training):
    averages = torch.load(training, weights_only=True)["state_dict"]
    with_settings(training, ema_decay=0.999)
    rewrite(training, extra_emas={"0.99": {name: tensor / 2 for name, tensor in averages.items()}})
    read = read_checkpoint(training, *([weights] if weights else []))
    assert (read.model_settings, read.recommended) == (grey_unet().settings, {})
    assert read.diffusion == DiffusionSettings(noise_schedule="cosine")
    raw = grey_unet().state_dict()
    assert read.state_dict.keys() == raw.keys()
    assert all(torch.equal(read.state_dict[name], factor * tensor) for name, tensor in raw.items())


def test_weights_that_a_file_does_not_have_are_refused_with_those_it_has(training, tmp_path):
    with_settings(training, ema_decay=0.999)
    with pytest.raises(UserError, match=r"`weights` must be one of ema, ema:0\.999, raw .*'ema:0\.5'"):
        read_checkpoint(training, "ema:0.5")
    rewrite(training, current_model_state=None)
    assert read_checkpoint(training, "ema").state_dict
    with pytest.raises(UserError, match=r"`weights` .*'raw'"):
        read_checkpoint(training, "raw")
    with pytest.raises(UserError, match=r"`weights` .*'raw'"):
        read_checkpoint(write_grey_unet(tmp_path / "a.safetensors"), "raw")


@pytest.mark.parametrize(
    "settings", [None, {}, [1], "network", 3, {"lr": 0.1}, {"network": {"depth": 3}, "diffusion": {}}]
)
def test_a_training_checkpoint_of_another_project_is_refused(settings, training):
    rewrite(training, hyper_parameters=settings)
    with pytest.raises(UserError, match="`checkpoint`"):
        read_checkpoint(training)
    if settings is None or "network" not in str(settings) or settings == "network":
        with pytest.raises(UserError, match="`checkpoint`"):
            load_training_checkpoint(training)


@pytest.mark.parametrize("state_dict", [[torch.zeros(2)], {"network.weight": "none"}, {3: torch.zeros(2)}, 3])
def test_weights_that_are_not_tensors_by_name_are_refused(state_dict, training, tmp_path):
    with pytest.raises(UserError, match=r"`checkpoint` .*tensors by name"):
        read_checkpoint(rewrite(training, state_dict=state_dict))
    torch.save(state_dict, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"`checkpoint` .*tensors by name"):
        read_checkpoint(tmp_path / "a.pt", settings=grey_unet().settings)


class CreatesFolder:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["last.ckpt", "network.pt"])
def test_a_pickle_with_code_is_refused_and_the_code_is_not_run(name, tmp_path):
    path = write_training_checkpoint(tmp_path / name)
    torch.save({**torch.load(path, weights_only=True), "extra": CreatesFolder(tmp_path / "folder")}, path)
    with pytest.raises(UserError, match="`checkpoint`"):
        read_checkpoint(path)
    assert not (tmp_path / "folder").exists()
    torch.load(path, weights_only=False)  # runs the code, so the test would notice it
    assert (tmp_path / "folder").is_dir()


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.ckpt", "."])
def test_a_file_that_does_not_exist_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"`checkpoint` must be a .*file"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_without_settings_is_refused_unless_they_are_given(metadata, plain, tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.safetensors", metadata=metadata)
    for path in (tmp_path / "a.safetensors", plain):
        with pytest.raises(UserError, match=f"`model` .*{path}"):
            read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"not a network at all" * 20, None])
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_a_damaged_file_is_refused(name, content, tmp_path):
    write = write_grey_unet if name == "a.safetensors" else write_training_checkpoint
    complete = write(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(complete[:-1000] if content is None else content)
    with pytest.raises(UserError, match=r"`checkpoint` .*damaged"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["a.safetensors", "last.ckpt", "a.pt"])
def test_a_changed_byte_gives_the_same_weights_or_is_refused(name, tmp_path):
    path, settings = tmp_path / name, grey_unet().settings
    if name == "a.pt":
        torch.save(dict(grey_unet().state_dict()), path)
    else:
        (write_grey_unet if name == "a.safetensors" else write_training_checkpoint)(path)
    whole, weights = path.read_bytes(), read_checkpoint(path, settings=settings).state_dict
    rng, refused = np.random.default_rng(0), 0
    for position in (*rng.integers(len(whole), size=20), *rng.integers(1500, size=10)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 64]) + whole[position + 1 :])
        try:
            read = read_checkpoint(path, settings=settings).state_dict
        except UserError:
            refused += 1
        else:
            assert all(torch.equal(read[key], tensor) for key, tensor in weights.items())
    assert refused >= 15


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_the_name_of_the_tensor(value, tmp_path, training):
    tensors = {"out.2.bias": torch.tensor([0.0, value])}
    with pytest.raises(UserError, match=r"`checkpoint` .*out\.2\.bias"):
        write_checkpoint(changed(grey_weights(), tensors), tmp_path / "a.safetensors")
    rewrite(training, state_dict={f"network.{name}": tensor for name, tensor in tensors.items()})
    for read in (read_checkpoint, load_training_checkpoint):
        with pytest.raises(UserError, match=r"`checkpoint` .*out\.2\.bias"):
            read(training)


def test_a_plain_state_dict_is_read_with_given_settings(plain):
    network = grey_unet()
    read = read_checkpoint(plain, settings=network.settings)
    assert (read.model_settings, read.diffusion) == (network.settings, DiffusionSettings())
    assert torch.equal(build_network(read)(*INPUTS, LABELS).out, network(*INPUTS, LABELS).out)


def prefixed(prefix):
    return {f"{prefix}{name}": tensor.contiguous() for name, tensor in grey_unet().state_dict().items()}


@pytest.mark.parametrize(
    "content",
    [
        prefixed("module."),
        prefixed("module._orig_mod."),
        prefixed("model.diffusion_model."),
        prefixed("module.") | {"n_averaged": torch.tensor(3)},
        {"model": prefixed(""), "step": 3, "optimizer": {"state": {}}},
        {"state_dict": prefixed("_orig_mod.")},
        {"model": {"other": torch.zeros(1)}, "ema": prefixed("module.")},
        {"params": {"other": torch.zeros(1)}, "params_ema": prefixed("")},
    ],
)
def test_weights_that_other_code_saved_are_found_under_their_prefix_and_key(content, tmp_path):
    expected = grey_unet().state_dict()
    for name in ("a.pt", "a.ckpt"):
        torch.save(content, tmp_path / name)
        read = read_checkpoint(tmp_path / name, settings=grey_unet().settings)
        assert {name: tensor.tolist() for name, tensor in read.state_dict.items()} == {
            name: tensor.tolist() for name, tensor in expected.items()
        }
    with pytest.raises(UserError, match=r"`weights` .*'raw'"):
        read_checkpoint(tmp_path / "a.ckpt", "raw", settings=grey_unet().settings)


def test_a_prefix_in_safetensors_is_removed(tmp_path):
    save_file(prefixed("model."), tmp_path / "a.safetensors")
    assert build_network(read_checkpoint(tmp_path / "a.safetensors", settings=grey_unet().settings))


def test_weights_under_several_keys_are_refused_with_the_keys(tmp_path):
    torch.save({"generator": prefixed(""), "critic": prefixed(""), "step": 3}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"`checkpoint` .*a\.pt.* generator, critic, step .* generator, critic\."):
        read_checkpoint(tmp_path / "a.pt", settings=grey_unet().settings)


def test_a_state_dict_is_memory_mapped_and_only_3x3_kernels_are_copied(plain):
    read = read_checkpoint(plain, settings=grey_unet().settings)
    built = build_network(read).state_dict()
    regions = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if plain.name in line]
    spans = [tuple(int(end, 16) for end in region[0].split("-")) for region in regions]

    def mapped(tensors):
        starts = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        return {name for name in starts if any(start <= starts[name] < end for start, end in spans)}

    assert mapped(read.state_dict) == read.state_dict.keys()
    kernels = {n for n, tensor in read.state_dict.items() if tensor.shape[2:] == (3, 3) and tensor.shape[1] > 1}
    assert mapped(built) == read.state_dict.keys() - kernels


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16), ("16-true", torch.float16)]
)
def test_weights_have_the_requested_precision_and_outputs_are_float32(precision, dtype):
    cast = cast_weights(build_network(grey_weights()), precision, torch.device("cpu"))
    dtypes = {name: parameter.dtype for name, parameter in cast.named_parameters()}
    first = {"input_blocks.0.0.weight", "input_blocks.0.0.bias"}
    assert {dtypes[name] for name in first} == {torch.float32}
    assert {dtypes[name] for name in dtypes.keys() - first} == {dtype}
    assert cast(torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.tensor([0])).out.dtype == torch.float32


def test_half_precision_does_not_round_away_the_noise_of_the_last_steps():
    network = cast_weights(build_network(grey_weights()), "bf16-true", torch.device("cpu"))
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = [network(x_t, torch.tensor([3]), torch.tensor([0])).out for x_t in (x, x.bfloat16().float())]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize(
    "tensor", [torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")], ids=str
)
def test_tensors_that_are_no_weights_are_refused(tensor, tmp_path):
    torch.save({"a.weight": tensor}, tmp_path / "a.pt")
    with refused("`checkpoint`", "a.pt"):
        read_checkpoint(tmp_path / "a.pt", settings=grey_unet().settings)


def test_further_averages_that_are_none_are_refused(tmp_path):
    path = write_training_checkpoint(tmp_path / "last.ckpt")
    torch.save({**torch.load(path), "extra_emas": 3}, path)
    with refused("`checkpoint`", "extra_emas"):
        read_checkpoint(path)


def test_a_name_that_is_not_utf8_is_read_and_written(tmp_path):
    path = write_grey_unet(tmp_path / "caf\udce9.safetensors")
    assert list(tmp_path.iterdir()) == [path]
    actual, expected = read_checkpoint(path).state_dict, grey_unet().state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
