"""Training is signed maximum likelihood: an objective's derivative in the network's numbers is a table of coefficients.

The network gives numbers, an objective maps them to one value a prompt, and the chain rule says

    grad objective = sum over the numbers of (d objective / d number) * grad number.

The first factor is found here without the network. The second is a backward pass that may go chunk by chunk, however
tightly the objective ties a group together. And the table is one thing to look at when something is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def coefficients(
    objective: Callable[..., Tensor], *, network: Sequence[str] = ("log_pi",), **numbers: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value of an objective and its derivative in the numbers that came from the network.

    (d sum_p objective_p) / (d number), each in the shape of its number. The pass over the network then is, chunk by
    chunk, `(table[chunk] * number[chunk]).sum().backward()`, and its gradients add up to those of the whole.

    Args:
        objective: numbers -> [P].
        network: the names of the numbers to differentiate in; the others are held fixed.
        **numbers: the objective's arguments, by name; a tensor's history is not followed.

    Returns:
        The value [P], detached, and for each name in `network` its table, detached.

    Raises:
        ValueError: a name in `network` is not among the numbers, or the objective does not give one value a prompt.

    Example:
        >>> from klimb.objectives import log_variance
        >>> value, table = coefficients(log_variance, log_pi=torch.zeros(1, 2), log_target=torch.tensor([[1.0, 0.0]]))
        >>> value.tolist(), table["log_pi"].tolist()  # negative: make it more likely
        ([0.25], [[-0.5, 0.5]])
    """
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name in network
        if isinstance(x := numbers.get(name), Tensor)
    }
    absent = [name for name in network if name not in leaves]
    if absent:
        raise ValueError(
            f"coefficients: got no tensor {', '.join(absent)}, expected one for each name in network"
        )
    fixed = {name: x.detach() if isinstance(x, Tensor) else x for name, x in numbers.items()}
    with torch.enable_grad():
        value = objective(**{**fixed, **leaves})
        if value.ndim != 1:
            raise ValueError(
                f"coefficients: got a value of shape {list(value.shape)}, expected [P]: one a prompt"
            )
        tables = torch.autograd.grad(value.sum(), list(leaves.values()))
    return value.detach(), dict(zip(leaves, tables, strict=True))
