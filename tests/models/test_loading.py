import json
import shutil

import pytest
import torch

from sagl.errors import UserError
from sagl.models import loading
from sagl.models.checkpoints import build_network
from sagl.models.loading import download_pretrained, load
from sagl.models.metadata import read_metadata, settings_from_metadata
from sagl.models.zoo import BUNDLED, RELEASED, PretrainedEntry
from sagl.settings.diffusion import DiffusionSettings
from sagl.utils.files import sha256
from tests.helpers.networks import grey_unet, grey_weights, write_grey_unet, write_training_checkpoint

COSINE = DiffusionSettings(noise_schedule="cosine", num_timesteps=100)


@pytest.fixture
def entry(monkeypatch):
    """A released network as small as the others of the tests; its file says nothing of itself."""
    tiny = PretrainedEntry(
        file="tiny_diffusion.pt",
        url="https://localhost/tiny_diffusion.pt",
        licence="MIT",
        settings=grey_unet().settings,
        diffusion=COSINE,
    )
    monkeypatch.setitem(RELEASED, "tiny", tiny)
    return tiny


@pytest.fixture
def cached(entry, monkeypatch, tmp_path):
    """That network's file, in a cache of its own."""
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path))
    return write_state(tmp_path / "models" / entry.file)


def write_state(path, **changes):
    path.parent.mkdir(exist_ok=True)
    torch.save(grey_unet(**changes).state_dict(), path)
    return path


def same(file, other):
    """Whether two files hold the same network."""
    weights = file.state_dict.keys() == other.state_dict.keys()
    weights = weights and all(torch.equal(file.state_dict[n], other.state_dict[n]) for n in file.state_dict)
    return weights and (file.model_settings, file.diffusion) == (other.model_settings, other.diffusion)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_file_is_read_with_the_settings_inside_it(kind, tmp_path):
    path = write_grey_unet(tmp_path / "a.safetensors", diffusion=COSINE, recommended={"respacing": "5"})
    file = load(kind(path))
    assert same(file, grey_weights(diffusion=COSINE))
    assert file.recommended == {"respacing": "5"}


def test_the_requested_weights_of_a_training_checkpoint_are_read(tmp_path):
    path = write_training_checkpoint(tmp_path / "last.ckpt")
    average, raw = load(path).state_dict, load(path, "raw").state_dict
    assert all(torch.equal(average[name], raw[name] / 2) for name in raw)


def test_the_bundled_network_is_loaded_by_name():
    file = load("fashion_mnist")
    assert (file.model_settings, file.diffusion) == settings_from_metadata(
        read_metadata(BUNDLED["fashion_mnist"]), BUNDLED["fashion_mnist"]
    )
    assert build_network(file).settings.num_classes == 10


@pytest.mark.parametrize("place", ["cache", "elsewhere"])
def test_a_released_network_is_loaded_by_name_or_by_its_file(place, entry, cached, tmp_path):
    file = load("tiny" if place == "cache" else write_state(tmp_path / "copy" / entry.file))
    assert same(file, grey_weights(diffusion=COSINE))
    build_network(file)


def test_a_file_with_settings_keeps_them_whatever_its_name(entry, tmp_path):
    path = write_training_checkpoint(tmp_path / "last.ckpt").rename(tmp_path / entry.file)
    assert load(path).diffusion == DiffusionSettings(noise_schedule="cosine")


def test_a_file_takes_precedence_over_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_training_checkpoint(tmp_path / "fashion_mnist")
    assert load("fashion_mnist").model_settings == grey_unet().settings


def test_a_download_is_checked_against_the_settings_of_its_name(entry, monkeypatch, tmp_path):
    def download_copy_of(path):
        def copy(url, target, *, check, **_):
            assert url == entry.url
            check(path)
            shutil.copy(path, target)

        (tmp_path / "models").mkdir(exist_ok=True)
        monkeypatch.setenv("SAGL_CACHE", str(tmp_path))
        monkeypatch.setattr(loading, "download", copy)
        return download_pretrained("tiny")

    right, wrong = write_state(tmp_path / "right.pt"), write_state(tmp_path / "wrong.pt", num_classes=4)
    with pytest.raises(UserError, match=r"1 parameters differ: label_emb\.weight"):
        download_copy_of(wrong)
    complete = right.read_bytes()
    headers = (b"PK\3\4", b"PK\1\2")  # of a tensor, and of its entry in the directory at the end
    for place in (len(complete) // 2, *(complete.index(header, 2) for header in headers)):
        damaged = bytearray(complete)
        damaged[place] ^= 1
        (tmp_path / "damaged.pt").write_bytes(damaged)
        with pytest.raises(UserError, match=r"`checkpoint` .*damaged\.pt is damaged"):
            download_copy_of(tmp_path / "damaged.pt")
    assert download_copy_of(right).read_bytes() == complete


def test_the_sha256_of_a_downloaded_file_is_recorded_and_compared(entry, cached):
    load("tiny")
    assert json.loads(cached.with_name(f"{entry.file}.sha256").read_text())["sha256"] == sha256(cached)
    write_state(cached, num_classes=4)
    with pytest.raises(UserError, match=r"`path` .*sha256"):
        load("tiny")


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("lsun_cats", "`model`"),
        ("fashion_mnis", "`model`"),
        ("absent.safetensors", "`checkpoint`"),
        ("absent/lsun_cat.pt", "`checkpoint`"),
        ("absent.ckpt", "`checkpoint`"),
    ],
)
def test_a_missing_name_or_file_is_refused(name, argument, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{argument} .*{name}"):
        load(name)


@pytest.mark.parametrize("name", ["fashion_mnist", "tiny"])
def test_raw_weights_of_a_network_with_one_set_are_refused_before_a_download(name, entry, monkeypatch):
    monkeypatch.setattr(loading, "download_pretrained", lambda name: pytest.fail("downloads"))
    with pytest.raises(UserError, match=r"`weights` .*(tiny|fashion_mnist)"):
        load(name, "raw")
