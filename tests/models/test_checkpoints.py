import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sagl.errors import UserError
from sagl.models.adm import Classifier
from sagl.models.checkpoints import (
    build_classifier,
    build_network,
    cast_weights,
    in_dtype,
    load_training_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from sagl.models.cpu_kernels import optimize_for_cpu
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.reference import draw_weights
from tests.helpers.tiny import grey_unet, network_file, write_tiny, write_tiny_classifier, write_training_checkpoint

FIXED = DiffusionSettings(noise_schedule="cosine", variance="learned_range", num_timesteps=400)


def changed(file, **tensors):
    """The file with some tensors replaced; None takes one away. Points in names are written as underscores twice."""
    tensors = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    state = {name: tensor for name, tensor in {**file.state_dict, **tensors}.items() if tensor is not None}
    return replace(file, state_dict=state)


# ------------------------------------------------------------------------------------------------- round trips


def test_float32_comes_back_bit_for_bit_with_settings_and_advice(tmp_path):
    advice = {"sampler": "ddim", "sag": {"scale": 0.3, "interval": [0.25, 1]}}
    file = network_file(recommended=advice, diffusion=FIXED)
    write_checkpoint(file, tmp_path / "a.safetensors")
    found = read_checkpoint(tmp_path / "a.safetensors")
    assert (found.model_settings, found.diffusion, found.recommended) == (file.model_settings, FIXED, advice)
    assert found.state_dict.keys() == file.state_dict.keys()
    assert all(torch.equal(found.state_dict[name], tensor) for name, tensor in file.state_dict.items())


def test_float16_comes_back_close_and_is_used_in_float32(tmp_path):
    write_checkpoint(in_dtype(network_file(), torch.float16), tmp_path / "a.safetensors")
    found, network = read_checkpoint(tmp_path / "a.safetensors"), grey_unet()
    assert {tensor.dtype for tensor in found.state_dict.values()} == {torch.float16}
    built = build_network(found)
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}
    assert any(not torch.equal(p, q) for p, q in zip(built.parameters(), network.parameters(), strict=True))
    told = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 2])
    error = (built(*told).out - network(*told).out).abs().max() / network(*told).out.abs().max()
    assert 0 < float(error) < 5e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"num_channels": 64, "channel_mult": (0.5, 1.5), "attention_resolutions": (4,)},
        {"num_head_channels": 16, "num_heads_upsample": 2},
        {"attention_resolutions": ()},
        {"num_classes": None, "null_label": False},
    ],
)
def test_every_kind_of_setting_comes_back_equal(settings, tmp_path):
    file = network_file(**settings)
    write_checkpoint(file, tmp_path / "a.safetensors")
    assert read_checkpoint(tmp_path / "a.safetensors").model_settings == file.model_settings


def test_what_is_built_computes_what_was_written_and_is_ready_for_use(tmp_path):
    network, built = grey_unet(), build_network(read_checkpoint(write_tiny(tmp_path / "a.safetensors")))
    told = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 2])
    torch.testing.assert_close(built(*told).out, network(*told).out, rtol=1e-5, atol=1e-6)
    assert not built.training
    assert not any(parameter.requires_grad for parameter in built.parameters())


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = write_tiny(tmp_path / "a.safetensors")
    before = target.read_bytes()

    def full_disk(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("sagl.models.checkpoints.save_file", full_disk)
    with pytest.raises(UserError, match=r"`target` .* cannot be written: no space"):
        write_checkpoint(network_file(), target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


# --------------------------------------------------------------------------------------------------- strictness


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"out__2__weight": None}, ("1 parameters differ", "out.2.weight", "(2, 32, 3, 3)", "has none")),
        ({"out__2__bias": torch.zeros(3)}, ("1 parameters differ", "out.2.bias", "(2,)", "(3,)")),
        ({"extra": torch.zeros(4)}, ("1 parameters differ", "extra", "have none", "(4,)")),
        ({"extra": torch.zeros(4), "out__2__weight": None}, ("2 parameters differ", "extra: ", "; out.2.weight: ")),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_refused_with_count_name_and_both_shapes(tensors, named):
    with pytest.raises(UserError) as error:
        build_network(changed(network_file(), **tensors))
    assert [part for part in ("`checkpoint`", *named) if part not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_weights_for_another_number_of_classes_are_refused():
    other = replace(network_file(), model_settings=grey_unet(num_classes=7).settings)
    with pytest.raises(UserError, match=r"label_emb\.weight: settings \(8, 128\), file \(4, 128\)"):
        build_network(other)


# ----------------------------------------------------------------------------------------- training checkpoints


@pytest.mark.parametrize(("weights", "factor"), [("ema", 0.5), ("raw", 1.0)])
def test_a_training_checkpoint_has_averaged_and_raw_weights(weights, factor, tmp_path):
    file = read_checkpoint(write_training_checkpoint(tmp_path / "last.ckpt"), weights)
    assert file.model_settings == grey_unet().settings
    assert file.diffusion == DiffusionSettings(noise_schedule="cosine")
    assert file.recommended == {}
    raw = grey_unet().state_dict()
    assert file.state_dict.keys() == raw.keys()
    assert all(torch.equal(file.state_dict[name], factor * tensor) for name, tensor in raw.items())


def test_the_average_is_read_if_nothing_is_said(tmp_path):
    path = write_training_checkpoint(tmp_path / "last.ckpt")
    left, asked = read_checkpoint(path), read_checkpoint(path, "ema")
    assert all(torch.equal(left.state_dict[name], tensor) for name, tensor in asked.state_dict.items())


# ---------------------------------------------------------------------------------------------------- refusals


class MakesFolder:
    """Unpickled, makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["last.ckpt", "network.pt"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_the_code_is_not_run(name, tmp_path):
    path = write_training_checkpoint(tmp_path / name)
    torch.save({**torch.load(path, weights_only=True), "extra": MakesFolder(tmp_path / "made")}, path)
    try:
        with pytest.raises(UserError, match="`checkpoint`") as error:
            read_checkpoint(path)
    finally:
        assert not (tmp_path / "made").exists()
    assert "\n" not in str(error.value)


def test_the_pickle_of_that_test_does_run_code_where_it_is_let(tmp_path):
    torch.save(MakesFolder(tmp_path / "made"), tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.ckpt", "."])
def test_a_file_that_is_not_there_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"`checkpoint` must be a \.safetensors, \.ckpt or \.pt file"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_without_settings_is_refused(metadata, tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(UserError, match="does not say which network it is for"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a network at all" * 20])
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_a_file_of_anything_else_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="`checkpoint`"):
        read_checkpoint(tmp_path / name)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    path = write_tiny(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="`checkpoint`"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "hyperparameters", [None, {}, [1], "abc", 3, {"lr": 0.1}, {"network": {"depth": 3}, "diffusion": {}}]
)
def test_a_training_checkpoint_of_another_project_is_refused(hyperparameters, tmp_path):
    content = {"state_dict": {"weight": torch.zeros(2)}} | (
        {} if hyperparameters is None else {"hyper_parameters": hyperparameters}
    )
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="`checkpoint`"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("hyperparameters", [None, [1], "network", {"lr": 0.1}])
def test_a_checkpoint_of_another_project_is_none_to_go_on_from(hyperparameters, tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": hyperparameters}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="`checkpoint` must be one that sagl fit wrote"):
        load_training_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("recommended", [[1], "abc"])
def test_a_training_checkpoint_that_recommends_no_settings_is_refused(recommended, tmp_path):
    path = write_training_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["recommended"] = recommended
    torch.save(content, path)
    with pytest.raises(UserError, match="`recommended` must be a mapping"):
        read_checkpoint(path)


@pytest.mark.parametrize("state", [[torch.zeros(2)], {"network.weight": "none"}, {3: torch.zeros(2)}, None])
def test_a_training_checkpoint_whose_weights_are_no_tensors_by_name_is_refused(state, tmp_path):
    path = write_training_checkpoint(tmp_path / "last.ckpt")
    torch.save({**torch.load(path, weights_only=True), "state_dict": state}, path)
    with pytest.raises(UserError, match="must hold a network's tensors by name"):
        read_checkpoint(path)


def test_a_plain_state_dict_without_names_is_refused(tmp_path):
    torch.save({0: torch.zeros(2), 1: torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="must hold a network's tensors by name"):
        read_checkpoint(tmp_path / "a.pt", settings=grey_unet().settings)


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.SAFETENSORS"])
def test_safetensors_under_another_ending_are_told_from_damage(name, tmp_path):
    path = write_tiny(tmp_path / "a.safetensors").rename(tmp_path / name)
    with pytest.raises(UserError, match=r"is a safetensors file .* Its name should end in \.safetensors"):
        read_checkpoint(path)


def test_raw_weights_that_a_checkpoint_does_not_have_are_refused(tmp_path):
    path = write_training_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(path, weights_only=True)
    del content["current_model_state"]
    torch.save(content, path)
    assert read_checkpoint(path, "ema").state_dict
    with pytest.raises(UserError, match="`weights` must be one of ema for"):
        read_checkpoint(path, "raw")


# -------------------------------------------------------------------------------------------- plain state dicts


def test_a_plain_state_dict_is_read_with_settings_that_are_given(tmp_path):
    network = grey_unet()
    torch.save(network.state_dict(), tmp_path / "released.pt")
    file = read_checkpoint(tmp_path / "released.pt", settings=network.settings)
    assert (file.model_settings, file.diffusion) == (network.settings, DiffusionSettings())
    told = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 2])
    assert torch.equal(build_network(file)(*told).out, network(*told).out)


def test_a_plain_state_dict_is_mapped_and_only_3x3_kernels_are_laid_out_anew(tmp_path):
    network = grey_unet()
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}  # as the released are
    torch.save(state, tmp_path / "released.pt")
    file = read_checkpoint(tmp_path / "released.pt", settings=network.settings)
    built = build_network(file).state_dict()
    regions = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "released.pt" in line]
    spans = [tuple(int(end, 16) for end in region[0].split("-")) for region in regions]

    def mapped(tensors):
        starts = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        return {name for name in starts if any(start <= starts[name] < end for start, end in spans)}

    assert mapped(file.state_dict) == state.keys()
    kernels = {name for name, tensor in state.items() if tensor.shape[2:] == (3, 3) and tensor.shape[1] > 1}
    assert mapped(built) == state.keys() - kernels


def test_without_settings_a_plain_state_dict_is_refused_and_the_way_out_is_said(tmp_path):
    torch.save(grey_unet().state_dict(), tmp_path / "released.pt")
    with pytest.raises(UserError, match=r"does not say which network it is for\. Add --model NAME"):
        read_checkpoint(tmp_path / "released.pt")


def test_weights_of_other_settings_are_refused_by_the_first_five_that_differ(tmp_path):
    torch.save(grey_unet().state_dict(), tmp_path / "released.pt")
    file = read_checkpoint(tmp_path / "released.pt", settings=replace(grey_unet().settings, num_channels=64))
    with pytest.raises(UserError, match=r"parameters differ") as refused:
        build_network(file)
    assert str(refused.value).count("; ") == 4


def test_settings_that_contradict_those_in_the_file_are_refused(tmp_path):
    path, settings = write_tiny(tmp_path / "a.safetensors"), grey_unet().settings
    assert (
        read_checkpoint(path, settings=replace(settings, dropout=0.3)).model_settings == settings
    )  # of training alone
    with pytest.raises(UserError, match="num_heads 4, not 2"):
        read_checkpoint(path, settings=replace(settings, num_heads=2))


def test_an_average_can_be_asked_for_by_its_decay(tmp_path):
    path = write_training_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["ema_decay"] = 0.999
    torch.save(content, path)
    assert read_checkpoint(path, "ema:0.999").state_dict.keys() == read_checkpoint(path, "ema").state_dict.keys()
    with pytest.raises(UserError, match=r"must be one of ema, ema:0\.999, raw for .*, got 'ema:0\.5'"):
        read_checkpoint(path, "ema:0.5")


def test_further_averages_are_read_by_their_decays(tmp_path):
    path = write_training_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(path, weights_only=True)
    content["extra_emas"] = {"0.99": {name: 2 * value for name, value in content["state_dict"].items()}}
    torch.save(content, path)
    average, further = read_checkpoint(path).state_dict, read_checkpoint(path, "ema:0.99").state_dict
    assert average.keys() == further.keys()
    assert all(torch.equal(further[name], 2 * average[name]) for name in average)


def test_a_file_with_one_set_of_weights_has_no_others(tmp_path):
    with pytest.raises(UserError, match="`weights` is for training checkpoints"):
        read_checkpoint(write_tiny(tmp_path / "a.safetensors"), "raw")


# ------------------------------------------------------------------------------------------------- classifiers


def test_a_classifier_comes_back_bit_for_bit_and_is_no_network_that_draws(tmp_path):
    read = read_checkpoint(write_tiny_classifier(tmp_path / "c.safetensors"))
    drawn = optimize_for_cpu(draw_weights(Classifier(read.model_settings), 1))
    told = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    assert torch.equal(build_classifier(read)(*told), drawn(*told))
    with pytest.raises(UserError, match="this one is a classifier"):
        build_network(read)
    with pytest.raises(UserError, match="this is a network that draws"):
        build_classifier(read_checkpoint(write_tiny(tmp_path / "a.safetensors")))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16), ("16-true", torch.float16)]
)
def test_weights_have_the_precision_asked_for_and_outputs_are_float32(precision, dtype, tmp_path):
    network = build_network(read_checkpoint(write_tiny(tmp_path / "a.safetensors")))
    cast = cast_weights(network, precision, torch.device("cpu"))
    dtypes = {name: parameter.dtype for name, parameter in cast.named_parameters()}
    first = {"input_blocks.0.0.weight", "input_blocks.0.0.bias"}
    assert {dtypes[name] for name in first} == {torch.float32}
    assert {dtypes[name] for name in dtypes.keys() - first} == {dtype}
    assert cast(torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.tensor([0])).out.dtype == torch.float32


def test_the_noise_of_the_last_steps_is_not_rounded_away_in_half_precision(tmp_path):
    network = cast_weights(
        build_network(read_checkpoint(write_tiny(tmp_path / "a.safetensors"))), "bf16-true", torch.device("cpu")
    )
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    out = [network(x_t, torch.tensor([3]), torch.tensor([0])).out for x_t in (x, x.bfloat16().float())]
    assert not torch.equal(*out)
