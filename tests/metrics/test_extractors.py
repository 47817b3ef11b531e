import pytest
import torch

from sagl.errors import UserError
from sagl.metrics.extractors import MAKERS, get_extractor
from sagl.settings.evaluation import EXTRACTORS

CPU = torch.device("cpu")
COUNT = 60


def test_every_extractor_that_is_named_can_be_made():
    assert tuple(MAKERS) == EXTRACTORS


def brightness(device):
    return lambda images: images.float().mean(dim=(2, 3))


def test_an_extractor_of_ones_own_is_found_by_its_place():
    assert get_extractor("effnet_lite0_64") is MAKERS["effnet_lite0_64"]
    made = get_extractor(f"{__name__}.brightness")(CPU)
    assert made(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)).flatten().tolist() == [7.0, 7.0]


@pytest.mark.parametrize("name", ["inception_of_mine", "no.such.module.f", f"{__name__}.missing", f"{__name__}.COUNT"])
def test_an_extractor_that_is_not_there_is_refused_with_those_that_are(name):
    with pytest.raises(
        UserError, match=r"`extractor` must be one of inception, effnet_lite0_64, .* (got|no function) "
    ):
        get_extractor(name)
