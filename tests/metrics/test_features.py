import pytest
import torch

from sagl.errors import UserError
from sagl.metrics.features import describe_resize, extract_features

IMAGES = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_single_tensor_is_taken_as_pooled_features():
    features = extract_features(IMAGES, lambda part: part.float().mean(dim=(2, 3)))
    assert features.pooled.shape == (5, 1)
    assert (features.spatial, features.logits) == (None, None)


def test_samples_that_were_not_converted_to_uint8_are_refused():
    with pytest.raises(UserError, match=r"`images_uint8` .*float32.*to_uint8"):
        extract_features(IMAGES.float(), lambda part: part.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    "extract",
    [lambda part: part.float(), lambda part: [1.0], lambda part: part.float().mean(), lambda part: torch.ones(1, 8)],
)
def test_an_output_that_is_no_feature_matrix_is_refused(extract):
    with pytest.raises(UserError, match=r"`extractor` .*\(2, D\)"):
        extract_features(IMAGES[:2], extract)


def test_an_extractor_without_a_description_resizes_its_own_way():
    assert describe_resize(lambda images: images) == "its own"
