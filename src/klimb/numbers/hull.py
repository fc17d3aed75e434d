"""Which moments reweighted draws can have at all: the nearest ones to a goal, and a proof where it is out of reach.

P prompts, G draws a prompt, K features. Weights s >= 0 that sum to 1 within every prompt give the moments
mean over prompts of sum_g s_g phi_g: the average of the prompts' convex hulls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Reach:
    """Where zero lies: among the reachable moments (their border included), or outside.

    Attributes:
        nearest: [K] the reachable moments nearest to zero, by the sum of absolute differences.
        direction: [K] the direction in which the reachable moments fall short of zero.
        most: the largest reachable direction . moments; below 0 (by more than rounding) proves that zero is out of reach.
    """

    nearest: Tensor
    direction: Tensor
    most: float

    @property
    def outside(self) -> bool:
        """Whether no weights have moments zero; proven, where it is True."""
        return self.most < -1e-12


def reach(x: Tensor, allowed: Tensor) -> Reach:
    """The reachable moments nearest to zero (subtract the goal first), by a linear programme.

    The separating direction is the programme's dual. It is checked against every draw, so that "outside" does not rest
    on the programme's tolerance (1e-7), within which a goal outside may pass for one on the border.

    Args:
        x: [P, G, K] features less the goal, each of about unit size.
        allowed: [P, G] which draws may have weight; at least one a prompt.

    Returns:
        A `Reach`.

    Example: the mean of 1, 2 and 3 cannot be 4. Nearest is 3, and no weights get more of it.
        >>> values = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> found = reach(values - 4, torch.ones(1, 3, dtype=torch.bool))
        >>> found.outside, found.nearest.tolist(), found.direction.tolist(), found.most
        (True, [-1.0], [1.0], -1.0)

    Source: that either weights or a separating direction exist is Farkas, 1902.
    """
    from scipy.optimize import linprog
    from scipy.sparse import block_array, coo_array, csr_array

    x = x.detach().double()
    num_prompts, _, num_features = x.shape
    prompt, draw = allowed.nonzero(as_tuple=True)
    num = len(prompt)
    values = csr_array(x[prompt, draw].numpy().T / num_prompts)
    totals = coo_array((np.ones(num), (prompt.numpy(), np.arange(num))), shape=(num_prompts, num))
    eye = csr_array(np.eye(num_features))
    # totals s = 1,  values s + short - over = 0,  least short + over
    found = linprog(
        np.concatenate([np.zeros(num), np.ones(2 * num_features)]),
        A_eq=block_array([[totals, None, None], [values, eye, -eye]]),
        b_eq=np.concatenate([np.ones(num_prompts), np.zeros(num_features)]),
        bounds=(0, None),
        method="highs",
    )
    assert found.status == 0, found.message  # it always has a solution
    short, over = found.x[num : num + num_features], found.x[num + num_features :]
    direction = torch.as_tensor(np.array(found.eqlin.marginals[num_prompts:]))
    most = torch.where(allowed, x @ direction, -torch.inf).amax(-1).mean().item()
    return Reach(torch.as_tensor(over - short), direction, most)


def in_words(
    found: Reach, phi: Tensor, allowed: Tensor, goal: Tensor, scale: Tensor, names: Sequence[str]
) -> str:
    """Why no finite lam reaches the goal, and what to do; `found` of (phi - goal) / scale."""
    if found.outside:
        near = ", ".join(
            f"{name} = {value:.4g}"
            for name, value in zip(names, (goal + scale * found.nearest).tolist(), strict=True)
        )
        direction = found.direction / scale
        size = direction.abs().max()
        asked = (direction @ goal / size).item()
        return (
            f"no weights on these draws reach the goal: {combination(direction, names)} would have to be "
            f"{asked:.4g} on average, and is at most {asked + found.most / size.item():.4g} with all weight on the best "
            f"draws of every prompt. The nearest moments within reach are {near}: ask for less than that, or draw more"
        )
    high = torch.where(allowed[..., None], phi, -math.inf).amax(1).mean(0)
    low = torch.where(allowed[..., None], phi, math.inf).amin(1).mean(0)
    at_limit = ((goal - high).abs() <= 1e-5 * scale) | ((goal - low).abs() <= 1e-5 * scale)
    said = [
        f"{name} = {value:.4g}"
        for name, value, there in zip(names, goal.tolist(), at_limit, strict=True)
        if there
    ]
    which = f"{', '.join(said)} is as far as any weights go" if said else "up to rounding"
    return (
        f"the goal is on the border of what these draws can reach ({which}), which takes an infinite lam. "
        "If that is meant, it is a hard constraint: give the reward -inf to the completions that must not occur "
        "(klimb.target.forbid); if not, ask for less"
    )


def combination(weights: Tensor, names: Sequence[str]) -> str:
    """'a - 0.5 b', the largest weight made 1."""
    weights = weights / weights[weights.abs().argmax()].abs()
    terms = [(w, name) for w, name in zip(weights.tolist(), names, strict=True) if abs(w) > 1e-6]
    text = " ".join(
        f"{'-' if w < 0 else '+'} {'' if abs(abs(w) - 1) < 1e-6 else f'{abs(w):.3g} '}{name}"
        for w, name in terms
    )
    return text.removeprefix("+ ")
