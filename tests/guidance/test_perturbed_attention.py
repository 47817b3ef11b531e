import pytest

from sagl.errors import UserError
from sagl.settings.guidance import PerturbedAttentionGuidance
from tests.helpers.guided import NETWORK, eps_by_formula, guided
from tests.helpers.reference_values import relative_error


@pytest.mark.parametrize("site", ["middle", "input.1", "output.0, output.3"])
@pytest.mark.parametrize("scale", [-0.5, 3.0])
def test_the_weak_prediction_has_the_identity_as_attention_map_at_the_sites(site, scale):
    base = eps_by_formula()
    weak_eps = eps_by_formula(edits={name.strip(): lambda q, k, v: v for name in site.split(",")})
    actual = guided(pag={"scale": scale, "site": site}).eps
    assert relative_error(actual, base + scale * (base - weak_eps)) < 1e-5
    assert relative_error(actual, base) > 1e-3


@pytest.mark.parametrize("site", ["input.0", "middle,output.9", "middle,", ""])
def test_a_site_without_attention_is_refused(site):
    with pytest.raises(UserError, match=r"`pag\.site`"):
        PerturbedAttentionGuidance(site=site).check_network(NETWORK.settings)
