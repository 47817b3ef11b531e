import pytest
import torch

from sagl.errors import UserError
from sagl.metrics.features import describe_resize, extract_features

IMAGES = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_of_none_but_a_tensor_are_the_pooled_ones():
    found = extract_features(IMAGES, lambda part: part.float().mean(dim=(2, 3)))
    assert found.pooled.shape == (5, 1)
    assert (found.spatial, found.logits) == (None, None)


@pytest.mark.parametrize(
    "given",
    [lambda part: part.float(), lambda part: [1.0], lambda part: part.float().mean(), lambda part: torch.ones(1, 8)],
)
def test_what_gives_no_features_is_refused(given):
    with pytest.raises(UserError, match=r"`extractor` must give features \(2, D\) of 2 images, got "):
        extract_features(IMAGES[:2], given)


def test_an_extractor_that_says_nothing_resizes_its_own_way():
    assert describe_resize(lambda images: images) == "its own"
