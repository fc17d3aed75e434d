"""What must hold for any numbers at all: ties, forbidden draws, atoms that are all but impossible."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klimb.objectives import coefficients, forward_kl, log_variance, reverse_kl

log_probs = st.one_of(
    st.floats(-30, 0), st.sampled_from([0.0, -1.0, -1.0, -700.0])
)  # ties and near-zero atoms
shifts = st.floats(-50, 50)
some = settings(deadline=None, max_examples=80, derandomize=True)


def groups(values, rows=2, columns=4):
    matrix = st.lists(values, min_size=rows * columns, max_size=rows * columns)
    return matrix.map(lambda x: torch.tensor(x, dtype=torch.float64).reshape(rows, columns))


def table(objective, **numbers):
    value, tables = coefficients(objective, **numbers)
    return value, tables["log_pi"]


def close(left, right, scale=1.0):
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10 * scale)


@some
@given(groups(log_probs), groups(log_probs), shifts)
def test_a_constant_in_the_target_is_log_z_and_no_more(log_pi, log_target, c):
    for objective, moved in ((reverse_kl, c), (log_variance, 0.0)):
        value, coefficient = table(objective, log_pi=log_pi, log_target=log_target)
        shifted, again = table(objective, log_pi=log_pi, log_target=log_target + c)
        close(again, coefficient, 1e3)
        close(shifted, value - moved, 1e6)
    close(
        table(forward_kl, log_pi=log_pi, log_w=log_target + c)[1],
        table(forward_kl, log_pi=log_pi, log_w=log_target)[1],
    )


@some
@given(groups(log_probs), groups(log_probs))
def test_on_policy_coefficients_sum_to_zero(log_pi, log_target):
    """What one draw gains in likelihood the others lose: a lost baseline or a one-sided shift shows here."""
    for objective in (reverse_kl, log_variance):
        close(table(objective, log_pi=log_pi, log_target=log_target)[1].sum(1), torch.zeros(2).double(), 1e4)
    close(table(forward_kl, log_pi=log_pi, log_w=log_target)[1].sum(1), -torch.ones(2).double())


@some
@given(groups(log_probs), groups(log_probs), st.permutations(range(4)))
def test_order_of_draws_and_neighbouring_prompts_do_not_matter(log_pi, log_target, order):
    for objective, name in ((reverse_kl, "log_target"), (log_variance, "log_target"), (forward_kl, "log_w")):
        value, coefficient = table(objective, log_pi=log_pi, **{name: log_target})
        permuted, coefficients_permuted = table(
            objective, log_pi=log_pi[:, order], **{name: log_target[:, order]}
        )
        close(permuted, value, 1e4)
        close(coefficients_permuted, coefficient[:, order], 1e3)
        alone, coefficients_alone = table(objective, log_pi=log_pi[:1], **{name: log_target[:1]})
        close(alone, value[:1])
        close(coefficients_alone, coefficient[:1])


@some
@given(groups(log_probs), shifts)
def test_an_even_residual_asks_for_nothing(log_pi, log_z):
    for objective in (reverse_kl, log_variance):
        value, coefficient = table(objective, log_pi=log_pi, log_target=log_pi + log_z)
        assert coefficient.abs().max() < 1e-11
        if objective is log_variance:
            assert value.abs().max() < 1e-20
        else:
            close(value, torch.full((2,), -log_z, dtype=torch.float64), 1e2)


@some
@given(st.floats(-30, 0), st.floats(-30, 30), st.integers(2, 6))
def test_one_outcome_drawn_again_and_again_is_not_a_signal(log_pi, log_target, num_draws):
    """Duplicates carry no contrast: exactly zero, not small."""
    same = {
        "log_pi": torch.full((1, num_draws), log_pi, dtype=torch.float64),
        "log_target": torch.full((1, num_draws), log_target, dtype=torch.float64),
    }
    for objective in (reverse_kl, log_variance):
        assert table(objective, **same)[1].abs().max() < 1e-13


@some
@given(groups(log_probs), groups(st.one_of(log_probs, st.just(-math.inf))))
def test_forward_kl_takes_forbidden_draws(log_pi, log_w):
    value, coefficient = table(forward_kl, log_pi=log_pi, log_w=log_w)
    assert value.isfinite().all()
    assert (coefficient[log_w.isneginf()] == 0).all()
    silent = log_w.isneginf().all(1)
    assert (value[silent] == 0).all()
    close(coefficient.sum(1), silent.double() - 1)
    for row in range(2):  # as if they had never been drawn
        kept = ~log_w[row].isneginf()
        if kept.any():
            alone = table(forward_kl, log_pi=log_pi[row : row + 1, kept], log_w=log_w[row : row + 1, kept])
            close(alone[0], value[row : row + 1])
            close(alone[1][0], coefficient[row, kept])


@some
@given(groups(log_probs), groups(log_probs), st.floats(0.01, 20))
def test_a_clip_bounds_every_coefficient(log_pi, log_target, clip):
    _, coefficient = table(reverse_kl, log_pi=log_pi, log_target=log_target, clip=clip)
    assert coefficient.abs().max() <= clip / 4 + 1e-12
    _, coefficient = table(log_variance, log_pi=log_pi, log_target=log_target, clip=clip)
    assert coefficient.abs().max() <= 2 * clip / 3 + 1e-9
    for objective in (reverse_kl, log_variance):
        loose = table(objective, log_pi=log_pi, log_target=log_target, clip=1e4)
        free = table(objective, log_pi=log_pi, log_target=log_target)
        close(loose[0], free[0], 1e4)
        close(loose[1], free[1])


@some
@given(groups(st.floats(-50, 0)), groups(st.floats(-50, 50)))
def test_float32_is_near_float64_and_stays_float32(log_pi, log_target):
    for objective, name in ((reverse_kl, "log_target"), (log_variance, "log_target"), (forward_kl, "log_w")):
        wide = table(objective, log_pi=log_pi, **{name: log_target})
        narrow = table(objective, log_pi=log_pi.float(), **{name: log_target.float()})
        for x, y in zip(wide, narrow, strict=True):
            assert y.dtype == torch.float32
            torch.testing.assert_close(y.double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", [reverse_kl, log_variance])
def test_a_forbidden_draw_is_refused_by_name(objective):
    log_target = torch.tensor([[0.0, -torch.inf]])
    with pytest.raises(ValueError, match=f"{objective.__name__}: got log_target = -inf.*use forward_kl"):
        objective(torch.zeros(1, 2), log_target)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("objective", "name"), [(reverse_kl, "log_target"), (log_variance, "log_target"), (forward_kl, "log_w")]
)
def test_nan_and_infinity_are_errors(objective, name, bad):
    number = torch.tensor([[0.0, bad]])
    with pytest.raises(ValueError, match=f"{objective.__name__}: got {name} = {bad}"):
        objective(torch.zeros(1, 2), number)
    with pytest.raises(ValueError, match=f"{objective.__name__}: got log_pi = {bad}"):
        objective(number, torch.zeros(1, 2))


def test_a_policy_or_law_that_cannot_make_the_draw_is_refused():
    never = torch.tensor([[0.0, -torch.inf]])
    with pytest.raises(ValueError, match=r"log_pi = -inf.*scored as it was drawn"):
        log_variance(never, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"log_q = -inf.*the law that the sampler states"):
        reverse_kl(torch.zeros(1, 2), torch.zeros(1, 2), never)


@pytest.mark.parametrize("objective", [reverse_kl, log_variance, forward_kl])
def test_shapes_are_not_broadcast(objective):
    with pytest.raises(ValueError, match=r"of shape \[2, 1\], expected \[2, 3\]"):
        objective(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"expected \[P, G\]"):
        objective(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("objective", [reverse_kl, log_variance])
def test_one_draw_is_not_silently_given_nothing(objective):
    with pytest.raises(ValueError, match="got 1 draw"):
        objective(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="got clip = 0"):
        objective(torch.zeros(2, 2), torch.zeros(2, 2), clip=0)


def test_one_draw_without_a_baseline():
    value, coefficient = table(
        reverse_kl, log_pi=torch.tensor([[-1.0]]), log_target=torch.tensor([[-3.0]]), baseline=None
    )
    assert value.tolist() == [2.0]
    assert coefficient.tolist() == [[2.0]]
