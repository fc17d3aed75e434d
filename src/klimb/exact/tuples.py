"""The exact expectation of anything computed from G draws: over all Y^G tuples, each with its probability.

Whether a group estimator is unbiased is settled here without a random number. Every tuple is a prompt with G draws,
so the estimator is called once, with [Y^G, G].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LIMIT = 1_000_000


def tuples(log_q: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
    """All tuples of G independent draws that can occur, and how likely each is.

    Args:
        log_q: [Y] the law of one draw, nats; sums to one. Outcomes of probability zero are left out.
        num_draws: G.

    Returns:
        Outcomes [M, G] and probabilities [M], detached; M = (number of possible outcomes)^G.

    Raises:
        ValueError: G < 1, the law does not sum to one, or there are more than a million tuples.

    Example:
        >>> outcomes, prob = tuples(torch.tensor([0.25, 0.75]).log(), 2)
        >>> outcomes.tolist(), [round(x, 4) for x in prob.tolist()]
        ([[0, 0], [0, 1], [1, 0], [1, 1]], [0.0625, 0.1875, 0.1875, 0.5625])
    """
    total = log_q.detach().exp().sum().item()
    if num_draws < 1 or abs(total - 1) > 1e-5:
        raise ValueError(
            f"tuples: got num_draws={num_draws} and a law of total {total}; expected at least 1, and 1"
        )
    possible = log_q.isneginf().logical_not().nonzero()[:, 0]
    if len(possible) ** num_draws > LIMIT:
        raise ValueError(
            f"tuples: got {len(possible)}^{num_draws} tuples, expected at most {LIMIT}: draw fewer"
        )
    outcomes = torch.cartesian_prod(*[possible] * num_draws).reshape(-1, num_draws)
    return outcomes, log_q.detach()[outcomes].sum(1).exp()


def expectation(
    estimator: Callable[[Tensor], Tensor], log_q: Tensor, num_draws: int, *, parameters: Sequence[Tensor] = ()
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """E[estimator] and E[grad estimator] over G independent draws of q.

    The gradient is that of the estimator's own value, as training takes it: the law of the draws is not
    differentiated.

    Args:
        estimator: outcomes [M, G] -> [M]; called once with all tuples.
        log_q: [Y] the law of one draw, nats.
        num_draws: G.
        parameters: what to differentiate in.

    Returns:
        The expected value (a scalar) and the expected gradient, one tensor a parameter.

    Raises:
        ValueError: as in `tuples`.

    Example: the sample variance with divisor G - 1 is unbiased, here for a fair coin.
        >>> value, _ = expectation(lambda y: y.float().var(1), torch.tensor([0.5, 0.5]).log(), 3)
        >>> round(value.item(), 6)
        0.25
    """
    outcomes, prob = tuples(log_q, num_draws)
    value = (prob * estimator(outcomes)).sum()
    gradient = torch.autograd.grad(value, list(parameters)) if parameters else ()
    return value.detach(), gradient


def gradient_variance(
    estimator: Callable[[Tensor], Tensor], log_q: Tensor, num_draws: int, *, parameter: Tensor
) -> Tensor:
    """E|g - E g|^2 of the gradient g of the estimator: its variance, summed over the parameter's entries.

    Args:
        estimator: outcomes [M, G] -> [M].
        log_q: [Y] the law of one draw, nats.
        num_draws: G.
        parameter: what to differentiate in.

    Returns:
        A scalar, the estimator's units squared.

    Raises:
        ValueError: as in `tuples`.

    Example:
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> score = lambda y: torch.log_softmax(theta, 0)[y].mean(1)
        >>> gradient_variance(score, torch.tensor([0.5, 0.5]).log(), 1, parameter=theta).item()
        0.5
    """
    outcomes, prob = tuples(log_q, num_draws)
    values = estimator(outcomes)
    rows = [torch.autograd.grad(value, parameter, retain_graph=True)[0].flatten() for value in values]
    each = torch.stack(rows)
    centred = each - prob @ each
    return (prob * centred.square().sum(1)).sum()
