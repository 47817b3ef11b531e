import sys
import urllib.error

import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

from sagl.errors import UserError
from sagl.metrics.extractors import MAKERS
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
    """What was asked of torch.hub."""
    asked = []
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load", lambda *what: asked.append(what) or Small())
    return asked


def test_features_are_those_of_the_port(hub):
    extract = MAKERS["dinov2"](CPU)
    assert hub == [("facebookresearch/dinov2", "dinov2_vitl14")]
    assert describe_resize(extract) == "bilinear to 224×224, as TensorFlow 1 does, no antialias"
    found = extract_features(IMAGES, extract)
    assert (found.spatial, found.logits) == (None, None)
    want = FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])(IMAGES)[0]
    assert torch.equal(found.pooled, want)
    assert want.std() > 0.01


def test_an_image_of_one_channel_is_grey(hub):
    extract, grey = MAKERS["dinov2"](CPU), IMAGES[:, :1]
    assert torch.equal(
        extract_features(grey, extract).pooled, extract_features(grey.expand(-1, 3, -1, -1), extract).pooled
    )


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), RuntimeError("no\nroute"), ImportError("no route")]
)
def test_where_it_cannot_be_fetched_one_line_says_so_and_what_to_copy(hub, monkeypatch, error):
    def fail(*what):
        raise error

    monkeypatch.setattr(torch.hub, "load", fail)
    with pytest.raises(UserError, match=r"^`extractor` dinov2 needs [^\n]*no route[^\n]* copy .*hub\.$"):
        MAKERS["dinov2"](CPU)


def test_without_torch_fidelity_it_says_what_to_install(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_dinov2", None)
    with pytest.raises(UserError, match=r"pip install 'sagl\[eval\]'"):
        MAKERS["dinov2"](CPU)
