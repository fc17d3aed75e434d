"""Which moments reweighted draws can have at all: inside, on the border or outside, by linear programmes.

P prompts, G draws a prompt, K features. Weights s >= 0 that sum to 1 within every prompt give the moments
mean over prompts of sum_g s_g phi_g: the average of the prompts' convex hulls. A tilt by a finite lam has all weights
above zero, so it reaches the inside of that set and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

INSIDE = 1e-6
"""least room that counts as inside; the programmes are solved to 1e-7"""


@dataclass(frozen=True)
class Reach:
    """Where zero lies among the reachable moments.

    Attributes:
        room: how deep inside: 1 at the reference's own moments, 0 on the border or outside.
        nearest: [K] the reachable moments nearest to zero, by the sum of absolute differences; zero unless outside.
        direction: [K] outside, direction . moments <= most < 0 for all reachable moments: the proof; else zero.
        most: the largest reachable direction . moments.
    """

    room: float
    nearest: Tensor
    direction: Tensor
    most: float

    @property
    def inside(self) -> bool:
        """Whether a finite tilt has moments zero."""
        return self.room > INSIDE

    @property
    def outside(self) -> bool:
        """Whether no weights have moments zero, proven by `direction`."""
        return self.most < 0


def reach(x: Tensor, u: Tensor) -> Reach:
    """Whether some reweighting of the draws has moments zero (subtract the goal first).

    Room is the largest t such that weights of at least t u have moments zero: a goal that is the share 1 - t of the way
    from the reference's moments to the border has room t. What is called outside is proven so: the separating direction
    is checked against every draw, without the programme's tolerances.

    Args:
        x: [P, G, K] features less the goal, each of about unit size.
        u: [P, G] the reference's weights, summing to 1 within the prompt; draws of weight 0 cannot be used.

    Returns:
        A `Reach`.

    Example: the mean of 1, 2 and 3 can be 2.5, halfway to the border, and cannot be 4.
        >>> third = torch.full((1, 3), 1 / 3)
        >>> values = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> round(reach(values - 2.5, third).room, 6), reach(values - 4, third).nearest.tolist()
        (0.5, [-1.0])

    Source: separation of a point from a polytope by linear programming duality is Farkas, 1902.
    """
    from scipy.optimize import linprog
    from scipy.sparse import block_array, coo_array, csr_array

    x, u = x.detach().double(), u.detach().double()
    num_prompts, _, num_features = x.shape
    prompt, draw = (u > 0).nonzero(as_tuple=True)
    values = x[prompt, draw].numpy().T / num_prompts
    one = np.ones(len(prompt))
    total = coo_array((one, (prompt.numpy(), np.arange(len(prompt)))), shape=(num_prompts, len(prompt)))
    limits = np.concatenate([np.ones(num_prompts), np.zeros(num_features)])
    zero = torch.zeros(num_features, dtype=torch.float64)

    # s = t u + v with v >= 0: v sums to 1 - t in every prompt, and its moments are -t times the reference's
    mean = (u[..., None] * x).sum(1).mean(0).numpy()
    equations = block_array(
        [[total, csr_array(np.ones((num_prompts, 1)))], [csr_array(values), csr_array(mean[:, None])]]
    )
    cost = np.append(0 * one, -1.0)
    bounds = np.concatenate([np.tile([0, np.inf], (len(one), 1)), [[0, 1]]])
    found = linprog(cost, A_eq=equations, b_eq=limits, bounds=bounds, method="highs")
    if found.status == 0 and -found.fun > INSIDE:
        return Reach(float(-found.fun), zero, zero, 0.0)

    eye = csr_array(np.eye(num_features))
    equations = block_array([[total, None, None], [csr_array(values), eye, -eye]])
    cost = np.concatenate([0 * one, np.ones(2 * num_features)])
    found = linprog(cost, A_eq=equations, b_eq=limits, bounds=(0, None), method="highs")
    assert found.status == 0, found.message  # it always has a solution
    missing = found.x[len(one) : len(one) + num_features] - found.x[len(one) + num_features :]
    direction = torch.as_tensor(np.array(found.eqlin.marginals[num_prompts:]))
    along = torch.where(u > 0, x @ direction, -torch.inf).amax(-1).mean().item()
    if found.fun > INSIDE and along < 0:
        return Reach(0.0, -torch.as_tensor(missing), direction, along)
    return Reach(0.0, zero, zero, 0.0)
