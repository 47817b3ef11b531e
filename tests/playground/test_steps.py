import pytest
import torch

from sagl.diffusion.process import x0_hat_from_eps
from sagl.playground.html import show_step
from sagl.playground.session import GUIDED, UNGUIDED
from sagl.playground.steps import attention_received
from tests.helpers.playground import compare, make_playground


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    return make_playground(tmp_path_factory.mktemp("playground"))


def test_the_records_of_a_step_are_those_of_the_guided_chain(playground):
    row = compare(playground).rows[GUIDED]
    ((*records,),) = row.chains
    assert [record.step for record in records] == [2, 1, 0]
    for record in records:
        eps, weak_eps = record.eps.double(), record.weak_eps.double()
        guided = eps + 0.5 * (eps - weak_eps)  # eq. 17
        x0_hat = x0_hat_from_eps(record.x_t.double(), guided, row.pipeline.schedule.alpha_bar(record.step))
        error = (x0_hat.clamp(-1, 1) - record.x0_hat.double()).abs()
        assert error.median() < 0.01  # half precision
        assert record.mask.shape == (2, 1, 8, 8)


def test_a_chain_without_guidance_has_no_weak_prediction_and_no_mask(playground):
    ((first, *_),) = compare(playground).rows[UNGUIDED].chains
    assert (first.weak_eps, first.mask) == (None, None)


def test_attention_received_has_mean_one_for_every_head(playground):
    row = compare(playground).rows[GUIDED]
    maps = attention_received(row.pipeline, row.chains[0][0].x_t[:1], 2, row.labels[0], "output.1")
    assert maps.shape == (4, 8, 8)
    torch.testing.assert_close(maps.mean(dim=(1, 2)), torch.ones(4))


def test_the_pictures_of_a_step_are_those_of_one_sample_of_any_batch(playground):
    row = compare(playground, first_id=3).rows[GUIDED]
    pages = {(i, k): show_step(row, i, k, "output.1") for i in row.ids for k in range(3)}
    assert len(set(pages.values())) == 6
    assert all(page.count("<img") == 6 + 5 for page in pages.values())
