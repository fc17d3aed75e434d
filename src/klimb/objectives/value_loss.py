"""The critic's objective: half the squared error to the returns, clipped as in PPO."""

from __future__ import annotations

import torch
from torch import Tensor

from klimb.objectives.aggregate import Aggregate, mean_over_group
from klimb.objectives.packed import require_packed


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor,
    row: Tensor,
    lengths: Tensor,
    *,
    clip: float | None = 0.2,
    aggregate: Aggregate = mean_over_group,
) -> Tensor:
    r"""Half the larger of two squared errors: of the value, and of the value kept within `clip` of the old one.

    $$ \text{aggregate}_t\, \tfrac12 \max\left[(V_t - R_t)^2,
       (V^{\text{old}}_t + \mathrm{clamp}(V_t - V^{\text{old}}_t, -c, c) - R_t)^2\right] $$

    Value: with `clip=None` half the mean squared error to the returns; with a clip an upper bound of it. Gradient:
    that of the value; zero where a value has moved towards its return by more than the clip. Its minimiser is the
    expected return of each prefix, if returns are unbiased for that (lambda = 1) and nothing is clipped.

    Args:
        values: [N] of the critic now, units of reward; what is differentiated.
        returns: [N] what they should be, units of reward (`klimb.numbers.advantages.gae`).
        old_values: [N] of the critic when the returns were made, units of reward.
        row: [N] which completion each token belongs to.
        lengths: [P, G] tokens.
        clip: in units of reward; None for never.
        aggregate: tokens -> one value a prompt.

    Returns:
        [P] units of reward squared.

    Raises:
        ValueError: shapes do not fit, a number is not finite, or clip is not above zero.

    Example:
        >>> values = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> row, lengths = torch.tensor([0, 0]), torch.tensor([[2]])
        >>> value = value_loss(values, torch.tensor([2.0, 2.0]), torch.tensor([0.9, 0.5]), row, lengths)
        >>> value.backward()
        >>> round(value.item(), 4), values.grad.tolist()  # the second has moved far enough
        (0.6725, [-0.5, 0.0])

    Source: Schulman et al., "Proximal policy optimization algorithms", 2017 (the authors' code, not the paper).

    Not the same as a trust region in the value: a value that has moved away from its return is always pulled back.
    """
    require_packed("value_loss", row, lengths, values=values, returns=returns, old_values=old_values)
    returns, old_values = returns.detach(), old_values.detach()
    error = (values - returns) ** 2
    if clip is not None:
        if not clip > 0:
            raise ValueError(f"value_loss: got clip = {clip}, expected more than 0 units of reward, or None")
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns) ** 2)
    return aggregate(error / 2, row, lengths)
