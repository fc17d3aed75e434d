"""One token by one uniform number: the inverse of the cumulated distribution, at its edges too."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klimb.samplers.ancestral import BLOCK, draw_tokens

ALMOST_ONE = 1 - 2**-53  # the largest float64 below one


def one(logits, uniform, **options):
    token, log_prob = draw_tokens(
        torch.as_tensor(logits)[None].clone(), torch.tensor([uniform], dtype=torch.float64), **options
    )
    return token.item(), log_prob.item()


def law(logits, temperature=1.0, top_p=1.0):
    """Temperature, then top-p, written down a second time in numbers of Python."""
    p = (torch.as_tensor(logits).double() / temperature).softmax(0).tolist()
    kept, mass = set(), 0.0
    for token in sorted(range(len(p)), key=lambda v: -p[v]):
        if mass >= top_p:
            break
        kept.add(token)
        mass += p[token]
    return [x / mass if v in kept else 0.0 for v, x in enumerate(p)]


def random_logits(size, seed=0, spread=3.0):
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [3, BLOCK - 1, BLOCK, BLOCK + 1, 1000])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.3, 1.0), (1.0, 0.8), (0.7, 0.5)])
def test_a_grid_of_uniforms_falls_as_the_law_says(size, temperature, top_p):
    # with M equally spaced uniforms every token is drawn M p times, give or take the two ends of its interval
    logits, grid = random_logits(size, spread=2.0), 4000
    uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    tokens, log_prob = draw_tokens(logits.repeat(grid, 1), uniform, temperature=temperature, top_p=top_p)
    expected = torch.tensor(law(logits, temperature, top_p), dtype=torch.float64)
    counts = torch.bincount(tokens, minlength=size)
    assert (counts - grid * expected).abs().max() <= 1.01
    assert (log_prob.exp() - expected[tokens]).abs().max() < 1e-6
    # the mutant: the law without temperature and top-p
    if (temperature, top_p) != (1.0, 1.0) and size > 3:
        plain = torch.tensor(law(logits), dtype=torch.float64)
        assert (counts - grid * plain).abs().max() > 10


@given(
    logits=st.lists(st.floats(-30, 30, width=32) | st.just(-math.inf), min_size=1, max_size=600).filter(
        lambda x: max(x) > -math.inf
    ),
    uniform=st.sampled_from([0.0, 2**-53, 1e-9, 0.5, 1 - 1e-9, ALMOST_ONE]) | st.floats(0, ALMOST_ONE),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_draw_has_mass_and_states_it(logits, uniform, temperature, top_p):
    token, log_prob = one(torch.tensor(logits), uniform, temperature=temperature, top_p=top_p)
    assert logits[token] > -math.inf
    assert -math.inf < log_prob <= 1e-6
    if top_p == 1.0:
        scaled = (torch.tensor(logits, dtype=torch.float64) / temperature).log_softmax(0)
        assert abs(log_prob - scaled[token].item()) < 1e-4


@pytest.mark.parametrize("size", [4, BLOCK, BLOCK + 4, 2 * BLOCK])
@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.999, ALMOST_ONE])
def test_the_ends_never_fall_on_a_forbidden_token(size, uniform):
    logits = torch.full((size,), -torch.inf)
    logits[size // 2] = 0.0  # all mass on one token, nothing before it and nothing after
    assert one(logits, uniform) == (size // 2, 0.0)


def test_uniform_zero_gives_the_first_token_with_mass_and_almost_one_the_last():
    logits = torch.full((2 * BLOCK + 9,), -torch.inf)
    logits[BLOCK + 3] = 0.0
    logits[2 * BLOCK + 1] = 0.0
    assert one(logits, 0.0)[0] == BLOCK + 3
    assert one(logits, 0.5 - 1e-12)[0] == BLOCK + 3
    assert one(logits, 0.5)[0] == 2 * BLOCK + 1  # an interval holds its lower end
    assert one(logits, ALMOST_ONE)[0] == 2 * BLOCK + 1


@pytest.mark.parametrize("place", [0, 100, BLOCK - 1, BLOCK, 5 * BLOCK + 17, 49_151])
def test_a_token_of_one_in_a_billion_can_be_drawn(place):
    # cumulated in float32 the interval would have no width and the token could never come
    logits = torch.zeros(49_152)
    logits[place] = math.log(1e-9 * 49_151 / (1 - 1e-9))
    p = logits.double().softmax(0)
    low = p[:place].sum().item()
    token, log_prob = one(logits, low + 0.5 * p[place].item())
    assert token == place
    assert abs(log_prob - math.log(1e-9)) < 1e-4
    narrow = p.float().cumsum(0)
    below = narrow[place - 1].item() if place else 0.0
    if place > BLOCK:  # the mutant
        assert not math.isclose(narrow[place].item() - below, 1e-9, rel_tol=0.1)


def test_rows_do_not_disturb_each_other():
    logits = torch.stack([random_logits(300, seed) for seed in range(50)])
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, log_prob = draw_tokens(logits, uniform)
    singly = [one(row, u) for row, u in zip(logits, uniform.tolist(), strict=True)]
    assert tokens.tolist() == [token for token, _ in singly]
    assert log_prob.tolist() == [value for _, value in singly]


def test_the_logits_are_left_as_they_were():
    logits = random_logits(300)[None]
    before = logits.clone()
    draw_tokens(logits, torch.tensor([0.3], dtype=torch.float64), top_p=0.9)
    assert torch.equal(logits, before)
