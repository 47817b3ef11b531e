from urllib.error import URLError

import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

from sagl.errors import UserError
from sagl.metrics.extractors import EXTRACTORS
from sagl.metrics.features import describe_resize, extract_features

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """Patches of 14 and their mean, in place of the 300 million parameters that come from a download."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.patches = nn.Conv2d(3, 8, 14, 14)

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return self.patches(x).relu().mean(dim=(2, 3))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Record the calls of torch.hub.load."""
    calls = []
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load", lambda *what: calls.append(what) or Small())
    return calls


def test_features_are_those_of_torch_fidelity(hub):
    extract = EXTRACTORS["dinov2"](CPU)
    assert hub == [("facebookresearch/dinov2", "dinov2_vitl14")]
    assert describe_resize(extract) == "bilinear to 224×224, as TensorFlow 1 does, no antialias"
    features = extract_features(IMAGES, extract)
    assert (features.spatial, features.logits) == (None, None)
    expected = FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])(IMAGES)[0]
    assert torch.equal(features.pooled, expected)
    assert expected.std() > 0.01


def test_a_single_channel_is_repeated(hub):
    extract, grey = EXTRACTORS["dinov2"](CPU), IMAGES[:, :1]
    assert torch.equal(extract(grey).pooled, extract(grey.expand(-1, 3, -1, -1)).pooled)


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("no\nroute"), ImportError("no route")])
def test_a_failed_download_is_refused_with_its_reason(hub, monkeypatch, error):
    def fail(*what):
        raise error

    monkeypatch.setattr(torch.hub, "load", fail)
    with pytest.raises(UserError, match=r"`extractor` .*no route"):
        EXTRACTORS["dinov2"](CPU)
