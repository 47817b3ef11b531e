import pytest

from sagl.errors import UserError
from sagl.settings.evaluation import EXTRACTOR_NAMES, ExtractionSettings, MetricSettings, require_extractor
from sagl.settings.training import PreviewSettings
from tests.helpers.errors import refused


@pytest.mark.parametrize("name", [*EXTRACTOR_NAMES, "my_package.features.mine", "mine.of"])
def test_names_and_full_names_of_functions_are_accepted(name):
    require_extractor(name)


@pytest.mark.parametrize("name", ["", "incepton", ".", "a.", ".b", "a..b", "my-package.f", "a.b c", "runs/mine.py"])
def test_other_names_are_refused_with_the_names_that_exist(name):
    with pytest.raises(UserError, match=r"`extractor` must be one of inception, effnet_lite0_64"):
        require_extractor(name)


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (MetricSettings, "num_neighbors", 0),
        (MetricSettings, "max_features", 1),
        (MetricSettings, "kid_subsets", 0),
        (MetricSettings, "kid_subset_size", 1),
        (MetricSettings, "bootstrap", 5),
        (MetricSettings, "seed", -1),
        (ExtractionSettings, "extractor", "incepton"),
        (ExtractionSettings, "batch_size", 0),
        (ExtractionSettings, "image_size", 0),
        (PreviewSettings, "extractor", "incepton"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, name, value):
    with pytest.raises(UserError, match=rf"`(preview\.)?{name}` .*{value}"):
        settings(**{name: value})


@pytest.mark.parametrize("name", ["kid_subsets", "bootstrap"])
def test_resamples_are_limited(name):
    with refused(f"`{name}`", "999"):
        MetricSettings(**{name: 10**40 - 1})
