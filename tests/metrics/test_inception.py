import zlib
from functools import cache

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sagl.errors import UserError
from sagl.metrics import inception as module
from sagl.metrics.extractors import EXTRACTORS
from sagl.metrics.features import describe_resize, extract_features, weights_version
from sagl.metrics.inception import tf1_resize_bilinear
from sagl.utils.files import sha256

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def random_weights(name, like):
    """An entry of the weights' file: a function of its name and shape, of a size that keeps features in bounds."""
    n = torch.randn(like.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if not like.is_floating_point():
        return like
    if like.dim() > 1:
        return n * (2 / like[0].numel()) ** 0.5
    return 1 + 0.1 * n.abs() if name.endswith(("weight", "running_var")) else 0.1 * n


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Seeded weights under the published file's keys."""
    with pytest.MonkeyPatch.context() as patch:  # without the published weights, which come from a download
        patch.setattr(torch, "load", lambda *args, **options: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        empty = FeatureExtractorInceptionV3("keys", ["2048"], feature_extractor_weights_path="none")
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({name: random_weights(name, value) for name, value in empty.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def extract(file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGL_INCEPTION", str(file))
        return EXTRACTORS["inception"](CPU)


@pytest.fixture(scope="module")
def features(extract):
    return extract_features(IMAGES, extract)


@pytest.fixture(scope="module")
def public(file):
    """torch-fidelity's own forward: pool3, logits without bias, and what Mixed_6d.branch1x1 gave on the way."""
    network = FeatureExtractorInceptionV3(
        "public", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
    )
    outputs = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda layer, x, out: outputs.append(out))
    pooled, logits = network(IMAGES)
    return pooled, logits, outputs[0]


@cache
def tf1_matrix(size, length):
    """TensorFlow's formula in float64: the matrix (length, size) of one dimension's weights."""
    matrix = np.zeros((length, size))
    for i in range(length):
        position = i * size / length
        low = int(np.floor(position))
        high = min(low + 1, size - 1)
        matrix[i, low] += 1 - (position - low)
        matrix[i, high] += position - low
    return matrix


def test_pooled_features_and_logits_are_those_of_torch_fidelity(features, public):
    pooled, logits, _ = public
    assert features.pooled.shape == (2, 2048)
    assert float(pooled.std()) > 0.01
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.logits, logits, rtol=1e-4, atol=1e-4)


def test_logits_have_no_bias(features, extract):
    product = features.pooled.double().numpy() @ extract.network.fc.weight.double().numpy().T
    assert features.logits.shape == (2, 1008)
    np.testing.assert_allclose(features.logits.numpy(), product, rtol=1e-4, atol=1e-5)
    assert float(extract.network.fc.bias.abs().max()) > 0.1


def test_spatial_features_are_seven_channels_of_all_positions_channels_last(features, public):
    maps = public[2]
    assert maps.shape == (2, 192, 17, 17)
    assert features.spatial.shape == (2, 2023)
    for row, column, channel in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (5, 11, 3), (16, 16, 6)):
        expected = maps[:, channel, row, column]
        torch.testing.assert_close(
            features.spatial[:, (row * 17 + column) * 7 + channel], expected, rtol=1e-4, atol=1e-5
        )
    whole = np.transpose(maps[:, :7].numpy(), (0, 2, 3, 1)).reshape(2, -1)
    np.testing.assert_allclose(features.spatial, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (299, 299), (400, 512), (1, 3)])
def test_images_are_tf1_resize_bilinear_as_tensorflow_1_does(shape):
    x = torch.randint(0, 256, (2, 3, *shape), generator=torch.Generator().manual_seed(1)).float()
    rows, columns = tf1_matrix(shape[0], 299), tf1_matrix(shape[1], 299)
    expected = rows @ x.double().numpy() @ columns.T
    np.testing.assert_allclose(tf1_resize_bilinear(x, 299), expected, atol=1e-2)  # TensorFlow too has places in float32


def test_a_single_channel_is_repeated(extract):
    grey = IMAGES[:1, :1]
    assert torch.equal(extract(grey).pooled, extract(grey.expand(-1, 3, -1, -1)).pooled)
    assert "as TensorFlow 1 does" in describe_resize(extract)


def test_weights_other_than_the_published_ones_have_the_version_of_their_content(file, extract, monkeypatch):
    assert weights_version(extract) == sha256(file)[:16]
    monkeypatch.setenv("SAGL_INCEPTION", str(file))
    monkeypatch.setattr(module, "FILE", f"weights-{sha256(file)[:8]}.pth")
    assert weights_version(EXTRACTORS["inception"](CPU)) == ""


def test_the_weights_are_found_in_both_caches(file, tmp_path, monkeypatch):
    monkeypatch.delenv("SAGL_INCEPTION", raising=False)
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    hub = tmp_path / "hub" / "hub" / "checkpoints" / module.FILE
    hub.parent.mkdir(parents=True)
    hub.symlink_to(file)
    assert module.weights_file() == hub
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / module.FILE).symlink_to(file)
    assert module.weights_file() == tmp_path / "ours" / module.FILE


def test_a_download_must_have_the_published_sha256(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SAGL_INCEPTION", raising=False)
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    calls = []

    def fake_download(url, target, *, check, licence):
        calls.append((url, target))
        (tmp_path / "page").write_bytes(b"a page")
        check(tmp_path / "page")

    monkeypatch.setattr(module, "download", fake_download)
    with pytest.raises(UserError, match="sha256"):
        module.weights_file()
    assert calls == [(module.URL, tmp_path / "ours" / module.FILE)]
    capsys.readouterr()


class Code:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "`SAGL_INCEPTION`"),
        (b"no weights", "run code"),
        (Code(), "run code"),
        ([1, 2], "tensors"),
        ({"fc.weight": torch.zeros(2)}, "another network's"),
    ],
    ids=["absent", "damaged", "code", "list", "other"],
)
def test_files_without_weights_are_refused(content, named, tmp_path, monkeypatch, capsys):
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    monkeypatch.setenv("SAGL_INCEPTION", str(path))
    with pytest.raises(UserError, match=named):
        EXTRACTORS["inception"](CPU)
    assert "ran" not in capsys.readouterr().out
