"""An objective asks for numbers by the names of its arguments; what it cannot have is the compatibility error."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping

from torch import Tensor

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def bind(
    objective: Callable[..., Tensor],
    available: Mapping[str, Tensor | None],
    *,
    instead: Callable[[Collection[str]], Collection[str]] | None = None,
) -> dict[str, Tensor]:
    """Pick an objective's arguments from the numbers at hand, by name.

    An argument with a default (log_q of reverse_kl) is taken where it is known and left alone where it is None. What
    `functools.partial` has already fixed stays fixed.

    Args:
        objective: any callable whose parameters are named as the numbers are.
        available: every number that may be asked for; None where it is unknown.
        instead: from the names of the known numbers to those of the methods that can do with them, for the message.

    Returns:
        The keyword arguments to call the objective with.

    Raises:
        ValueError: arguments without a default are unknown; all of them are named.

    Example:
        >>> import torch
        >>> from klimb.objectives import log_variance
        >>> sorted(bind(log_variance, {"log_pi": torch.zeros(1, 2), "log_target": torch.zeros(1, 2), "log_q": None}))
        ['log_pi', 'log_target']
        >>> bind(log_variance, {"log_pi": torch.zeros(1, 2), "log_target": None})
        Traceback (most recent call last):
        ValueError: log_variance: got no log_target, and it cannot do without; known are log_pi
    """
    known = {name: x for name, x in available.items() if x is not None}
    missing = lacking(objective, known)
    if missing:
        others = () if instead is None else instead(known)
        raise ValueError(
            f"{name_of(objective)}: got no {', '.join(missing)}, and it cannot do without; "
            f"known are {', '.join(known) or 'no numbers'}"
            + (f". These methods can do with what is known: {', '.join(others)}" if others else "")
        )
    return {name: known[name] for name in wanted(objective) if name in known}


def wanted(objective: Callable[..., Tensor]) -> dict[str, inspect.Parameter]:
    """The arguments that an objective asks for by name, without those that `functools.partial` has fixed.

    Example:
        >>> list(wanted(functools.partial(bind, available={})))
        ['objective', 'instead']
    """
    fixed = objective.keywords if isinstance(objective, functools.partial) else {}
    return {
        name: parameter
        for name, parameter in inspect.signature(objective).parameters.items()
        if name not in fixed and parameter.kind not in VARIADIC
    }


def lacking(objective: Callable[..., Tensor], known: Collection[str]) -> list[str]:
    """The arguments without a default whose names are not among the known ones.

    Example:
        >>> lacking(bind, ["objective"])
        ['available']
    """
    return [name for name, p in wanted(objective).items() if p.default is p.empty and name not in known]


def name_of(objective: Callable[..., Tensor]) -> str:
    """The name of a function, under any number of `functools.partial`.

    Example:
        >>> name_of(functools.partial(bind, available={}))
        'bind'
    """
    while isinstance(objective, functools.partial):
        objective = objective.func
    return getattr(objective, "__name__", type(objective).__name__)
