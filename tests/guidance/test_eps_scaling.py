import pytest
import torch

from sagl.errors import UserError
from tests.helpers.guided import NETWORK, STEP, guided
from tests.helpers.networks import count_calls


@pytest.mark.parametrize(("scale", "slope"), [(0.017, 0.0), (0.005, 1e-3), (-0.1, 0.02)])
def test_the_base_prediction_is_divided_and_other_terms_are_not(scale, slope):
    base, pag = guided(), guided(pag={"scale": 2.0})
    settings = {"scale": scale, "slope": slope}
    scaled = base.eps / (1 + scale + slope * STEP)
    torch.testing.assert_close(guided(eps_scaling=settings).eps, scaled, rtol=1e-5, atol=1e-5)
    together = guided(eps_scaling=settings, pag={"scale": 2.0}).eps
    torch.testing.assert_close(together, scaled + pag.eps - base.eps, rtol=1e-5, atol=1e-5)


def test_it_costs_no_evaluation():
    calls = count_calls(NETWORK)
    assert guided(eps_scaling={"scale": 0.01}).nfe == len(calls) == 1


def test_a_slope_whose_divisors_are_not_positive_is_refused():
    with pytest.raises(UserError, match=r"`eps_scaling\.scale`"):
        guided(eps_scaling={"scale": 0.5, "slope": -0.2})
