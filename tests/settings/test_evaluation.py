import pytest

from sagl.errors import UserError
from sagl.settings.evaluation import EXTRACTORS, MetricSettings, require_extractor
from sagl.settings.training import PreviewSettings
from tests.helpers.tiny import exit_code


@pytest.mark.parametrize("name", [*EXTRACTORS, "my_package.features.mine", "mine.of"])
def test_a_name_or_a_place_of_ones_own_is_an_extractor(name):
    require_extractor(name)


@pytest.mark.parametrize("name", ["", "incepton", ".", "a.", ".b", "a..b", "my-package.f", "a.b c", "runs/mine.py"])
def test_what_is_neither_is_refused_with_what_there_is(name):
    with pytest.raises(UserError, match=r"`extractor` must be one of inception, effnet_lite0_64, .*package\.function"):
        require_extractor(name)


@pytest.mark.parametrize("verb", ["evaluate", "statistics"])
def test_a_misspelled_extractor_is_refused_before_the_images_are_looked_for(verb, capsys, tmp_path):
    output = ["--output", tmp_path / "r.npz"] if verb == "statistics" else []
    assert exit_code(verb, tmp_path / "nowhere", "--extractor", "incepton", *output) == 2
    assert "`extractor` must be one of inception" in capsys.readouterr().err


def test_previews_take_the_same_extractors():
    assert PreviewSettings(extractor="effnet_lite0_224").extractor == "effnet_lite0_224"
    with pytest.raises(UserError, match=r"`preview\.extractor` must be one of inception"):
        PreviewSettings(extractor="incepton")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"neighbours": 0}, "`neighbours` must be at least 1, got 0"),
        ({"num_kept": 1}, "`num_kept` must be at least 2, got 1"),
        ({"kid_subsets": 0}, "`kid_subsets` must be at least 1"),
        ({"kid_subset_size": 1}, "`kid_subset_size` must be at least 2"),
        ({"bootstrap": 5}, "`bootstrap` must be 0, which is off, or at least 20 draws, got 5"),
        ({"seed": -1}, "`seed` must be in 0"),
    ],
)
def test_settings_that_cannot_be_counted_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        MetricSettings(**given)
