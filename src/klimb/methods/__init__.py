"""The table of methods: target x divergence x draws, with what each claims and where the claim ends.

`claim` says what a test of the row has to show. "gradient": its mean update is the divergence's gradient. "minimiser":
its minimum is the target. "value": its minimum is another law, which is named. "law": its draws have the law named. A
caveat is tested as well: by a case where a neighbour's belief fails.

One idea a file: row (what a row says), the rows by how the target is known (density, comparisons, likelihood,
surrogates), table (all of them, and the row of a name), penalty (how KL is charged where that is a choice), known (which can
be trained on which numbers), destinations (the table of targets).
"""

from klimb.methods.destinations import TARGETS, Destination
from klimb.methods.known import weighs_by_law, working_with, works
from klimb.methods.penalty import KL_PENALTIES, PENALISED, takes_penalty, with_penalty
from klimb.methods.row import Method, Numbers
from klimb.methods.table import METHODS, NOT_PROVIDED, method

__all__ = [
    "KL_PENALTIES",
    "METHODS",
    "NOT_PROVIDED",
    "PENALISED",
    "TARGETS",
    "Destination",
    "Method",
    "Numbers",
    "method",
    "takes_penalty",
    "weighs_by_law",
    "with_penalty",
    "working_with",
    "works",
]
