import pytest

from sagl.analysis.cost import analyze_cost
from tests.helpers.analyses import analysis_request
from tests.helpers.networks import grey_unet, write_grey_classifier


@pytest.mark.parametrize("has_classifier", [False, True])
def test_the_cost_is_that_of_every_combination_with_the_classifier(has_classifier, tmp_path):
    classifier = str(write_grey_classifier(tmp_path / "c.safetensors")) if has_classifier else None
    numbers = analyze_cost(analysis_request(grey_unet(), tmp_path, classifier=classifier))
    guided = {"classifier": 2, "SAG + classifier": 4} if has_classifier else {}
    assert {name: row["evaluations"] for name, row in numbers.items()} == {"unguided": 2, "SAG": 4, **guided}
    assert all(row["seconds_per_image"] >= 0 for row in numbers.values())
    assert all(row["gigabytes"] > 0 for row in numbers.values())
    if has_classifier:  # whose gradients keep the features of all its layers
        assert numbers["classifier"]["gigabytes"] > numbers["unguided"]["gigabytes"]
