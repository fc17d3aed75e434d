"""A table of logits can be any law over the strings, and gives back the law it was made of."""

import pytest
import torch

from klimb.exact import all_strings, categorical, draw, log_prob, random_logits, table_of, token_log_prob

SPACE = all_strings(3, 3)


def law(seed, scale=1.0):
    return categorical(random_logits(SPACE.size, generator=torch.Generator().manual_seed(seed), scale=scale))


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])
def test_every_law_over_strings_is_a_table(scale):
    truth = law(1, scale)
    torch.testing.assert_close(log_prob(table_of(truth, SPACE), SPACE), truth, rtol=1e-12, atol=1e-12)


def test_forbidden_strings_stay_forbidden():
    forbidden = SPACE.strings[:, 0] == 1  # also leaves a whole branch without mass
    truth = law(2).masked_fill(forbidden, -torch.inf)
    truth = truth - truth.logsumexp(0)
    table = table_of(truth, SPACE)
    assert not table.isnan().any()
    torch.testing.assert_close(table.exp().sum(1), torch.ones(SPACE.num_prefixes, dtype=torch.float64))
    again = log_prob(table, SPACE)
    assert torch.equal(again.isneginf(), forbidden)
    torch.testing.assert_close(again[~forbidden], truth[~forbidden], rtol=1e-12, atol=1e-12)


def test_token_log_prob_by_hand():
    table = torch.log(torch.tensor([[0.5, 0.2, 0.3]]).expand(SPACE.num_prefixes, 3))
    y = [ids.tolist() for ids in SPACE.completions].index([1, 2, 0])
    expected = torch.tensor([0.2, 0.3, 0.5]).log()
    torch.testing.assert_close(token_log_prob(table, SPACE)[y], expected)


def test_the_gradient_of_a_log_prob_has_mean_zero():
    table = random_logits(SPACE.num_prefixes, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    logs = log_prob(table, SPACE)
    (score,) = torch.autograd.grad((logs.exp().detach() * logs).sum(), table)
    assert score.abs().max() < 1e-15


def test_draws_follow_the_law_and_the_generator():
    truth = law(4)
    index = draw(truth, 50, num_prompts=2000, generator=torch.Generator().manual_seed(5))
    assert index.shape == (2000, 50)
    counts = torch.bincount(index.flatten(), minlength=SPACE.size).double()
    expected = truth.exp() * index.numel()
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert chi2 < 36.1  # 99.9 % of chi2 with 14 degrees of freedom
    mutant = (expected.mean() - expected).square().div(expected).sum().item()  # draws from the uniform law
    assert mutant > 1000
    again = draw(truth, 50, num_prompts=2000, generator=torch.Generator().manual_seed(5))
    assert torch.equal(index, again)


def test_a_table_of_another_space_is_refused():
    with pytest.raises(ValueError, match=r"got a table \[2, 3\], expected \[7, 3\]"):
        log_prob(torch.zeros(2, 3), SPACE)
