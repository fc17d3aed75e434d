"""Which methods can be trained, by the numbers that are known of the draws."""

from __future__ import annotations

from collections.abc import Collection

from klimb.methods.row import Method, Numbers
from klimb.methods.table import METHODS
from klimb.objectives.bind import lacking, wanted

OF_THE_POLICY = frozenset(
    {"log_pi", "token_log_pi", "log_old", "token_log_old", "log_start", "row", "old_values"}
)
"""numbers that training has of any draws: the network's own, before and in an update, and a critic's"""
OF_THE_DRAWING_LAW = frozenset({"log_q", "log_old", "token_log_old"})
"""numbers by which a draw is weighed for the law that it came from"""


def working_with(known: Collection[str]) -> list[str]:
    """The methods that can be trained where of the draws these numbers are known, in the order of the table.

    Where log_q is unknown, a method that weighs its draws by the law they came from is not among them, though it may
    have a default: that holds for draws of the policy itself, and their log_q is known.

    Args:
        known: names of numbers, besides those that training has of any draws.

    Example:
        >>> working_with(["log_target", "reward"])
        ['log_variance', 'sft', 'raft', 'filtered']
        >>> working_with(["log_target", "log_q", "log_w"])
        ['log_variance', 'reverse_kl', 'forward_kl', 'sft']
    """
    return [name for name, row in METHODS.items() if row.objective is not None and works(row, known)]


def weighs_by_law(function: Numbers) -> bool:
    """True if a function of numbers weighs draws by the law they came from, and would take draws of an unknown one for the policy's.

    Example:
        >>> [weighs_by_law(METHODS[name].objective) for name in ("reverse_kl", "log_variance")]
        [True, False]
    """
    return not OF_THE_DRAWING_LAW.isdisjoint(wanted(function))


def works(row: Method, known: Collection[str]) -> bool:
    """True if a row can be trained where of the draws these numbers are known, besides those that training has of any draws."""
    assert row.objective is not None
    names = OF_THE_POLICY.union(known)
    for name, function in (*row.derived.items(), ("", row.objective)):
        if lacking(function, names) or ("log_q" not in names and weighs_by_law(function)):
            return False
        names |= {name}
    return True
