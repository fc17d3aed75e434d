"""Finite spaces, where everything can be summed: what is claimed of an estimator is checked here without randomness.

Y outcomes, P prompts, G draws a prompt, T tokens, V vocabulary, S prefixes. Everything is in nats. Enumeration is
"every outcome once from the uniform law", log_q = -log Y, so the objectives themselves are exact here.
"""

from klimb.exact.space import Space, all_strings
from klimb.exact.tabular import categorical, draw, log_prob, random_logits, table_of, token_log_prob
from klimb.exact.truth import (
    Point,
    best_objective,
    frontier_point,
    gap,
    kl,
    log_partition,
    mean,
    normalise,
    objective,
    tilt,
)
from klimb.exact.tuples import expectation, gradient_variance, tuples

__all__ = [
    "Point",
    "Space",
    "all_strings",
    "best_objective",
    "categorical",
    "draw",
    "expectation",
    "frontier_point",
    "gap",
    "gradient_variance",
    "kl",
    "log_partition",
    "log_prob",
    "mean",
    "normalise",
    "objective",
    "random_logits",
    "table_of",
    "tilt",
    "token_log_prob",
    "tuples",
]
