import torch

from sagl.diffusion.noise import SampleKeys, guidance_rngs
from sagl.guidance.token_perturbation import draw_permutations
from tests.helpers.formulas import attend
from tests.helpers.guided import KEYS, STEP, eps_by_formula, guided
from tests.helpers.reference_values import relative_error


def permutations(count, keys=KEYS, step=STEP):
    return draw_permutations(guidance_rngs(keys, "tpg", step), count)


def test_the_weak_prediction_has_shuffled_tokens_at_the_site():
    shuffle = permutations(64)

    def attend_to_shuffled(*parts):
        tokens = [torch.stack([x[:, order] for x, order in zip(part, shuffle, strict=True)]) for part in parts]
        return attend(torch.cat(tokens, dim=1), 1, "new")[0]

    base, weak_eps = eps_by_formula(), eps_by_formula(edits={"middle": attend_to_shuffled})
    actual = guided(tpg={"scale": 2.0}).eps
    assert relative_error(actual, base + 2.0 * (base - weak_eps)) < 1e-5
    assert relative_error(actual, base) > 1e-3


def test_every_sample_step_and_site_has_a_permutation_of_its_own():
    first, second = permutations(64)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(64))
    assert not torch.equal(first, second)
    assert not torch.equal(first, permutations(64, step=STEP - 1)[0])
    rngs = guidance_rngs(KEYS, "tpg", STEP)
    assert not torch.equal(draw_permutations(rngs, 64), draw_permutations(rngs, 64))


def test_the_permutation_of_a_sample_does_not_depend_on_the_batch():
    assert torch.equal(permutations(64)[1], permutations(64, SampleKeys(KEYS.seed, (8,)))[0])
