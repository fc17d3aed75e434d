"""How a surrogate is charged for KL: eight ways, in the reward or as a loss, and what each really optimises."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from klimb.methods.row import Method
from klimb.methods.table import METHODS
from klimb.nearest import nearest
from klimb.numbers.advantages import reward_less_kl
from klimb.objectives.kl_penalty import CELLS, ESTIMATORS
from klimb.objectives.penalised import penalised

KL_PENALTIES = {
    f"{name}_{how}": (name, use)
    for how, use in (("in_reward", "reward"), ("as_loss", "loss"))
    for name in ESTIMATORS
}
"""how a policy gradient of the reward can be charged for KL -> its cell of the table of `klimb.objectives.kl_penalty`"""


def takes_penalty(row: Method) -> bool:
    """True if the KL penalty of a row is a choice: a surrogate with one advantage a completion.

    Example:
        >>> PENALISED
        ('rloo', 'grpo', 'dr_grpo', 'dapo', 'gspo', 'cispo')
    """
    return "advantage" in row.derived


PENALISED = tuple(name for name, row in METHODS.items() if takes_penalty(row))
"""the methods whose KL penalty is a choice"""


def with_penalty(row: Method, choice: str) -> Method:
    """The row with this KL penalty in the place of its own, if it had one, and what that optimises as its caveat.

    Args:
        row: one that `takes_penalty`.
        choice: k1_in_reward, k2_as_loss, ...

    Raises:
        ValueError: the row takes none, or there is no such penalty.

    Example:
        >>> with_penalty(METHODS["dr_grpo"], "k1_as_loss").caveat
        'k1_as_loss: wrong: zero, noise that penalises nothing'
    """
    if choice not in KL_PENALTIES:
        raise ValueError(
            f"got kl_penalty {choice!r}{nearest(choice, KL_PENALTIES)}, expected one of {', '.join(KL_PENALTIES)}"
        )
    if not takes_penalty(row):
        raise ValueError(
            f"kl_penalty {choice}: this method has its KL elsewhere; leave it out, or use one of "
            f"{', '.join(PENALISED)}"
        )
    name, use = KL_PENALTIES[choice]
    assert row.objective is not None
    estimator, own = ESTIMATORS[name], partial(row.objective, penalty=None)
    derived = {what: function for what, function in row.derived.items() if what != "reward"}
    if use == "reward":
        derived = {"reward": partial(reward_less_kl, estimator=estimator), **derived}
    return replace(
        row,
        divergence=f"{row.divergence}; KL to the reference as {choice}",
        caveat=f"{choice}: {CELLS[name, use].says}",
        objective=own if use == "reward" else partial(penalised, surrogate=own, estimator=estimator),
        derived=derived,
    )
