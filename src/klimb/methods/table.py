"""The table of methods, and the row of a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from klimb.methods.comparisons import COMPARISONS, f_dpo
from klimb.methods.density import DENSITY
from klimb.methods.likelihood import LIKELIHOOD
from klimb.methods.row import Method
from klimb.methods.surrogates import SURROGATES
from klimb.nearest import nearest
from klimb.objectives.f_divergence import f_divergence
from klimb.objectives.generators import FAMILIES, divergence

SAMPLERS: Mapping[str, Method] = MappingProxyType(
    {
        "best_of": Method(
            knows="ranks",
            divergence="none",
            draws="the reference",
            claim="law",
            fixed_point="nothing is trained",
            caveat="the tilt of the reward's log quantile at 1/beta = n - 1, not of the reward",
            source="Beirami et al., 2025",
        ),
        "rejection": Method(
            knows="density and a bound of the reward",
            divergence="none",
            draws="the reference",
            claim="law",
            fixed_point="nothing is trained",
            caveat="a bound that a reward exceeds is an error; tries grow as exp(bound / beta) / Z",
            source="von Neumann, 1951",
        ),
    }
)
"""what draws better completions and trains nothing"""

METHODS: Mapping[str, Method] = MappingProxyType(
    {**DENSITY, **COMPARISONS, **LIKELIHOOD, **SURROGATES, **SAMPLERS}
)

NOT_PROVIDED: Mapping[str, str] = MappingProxyType(
    {
        "rebel": "is log_variance at two draws with the last round's policy as the moving reference",
        "oapl": "is trajectory_balance with the last round's policy as the moving reference",
        "mpo": "is reward_weighted on draws of the last round's policy",
        "qrpo": "is trajectory_balance of the quantile reward with its exact log Z (quantile_log_partition)",
        "best_of_n_distillation": "is sft on draws of the best_of sampler",
        "online_dpo": "is dpo, which unless learn_from is data compares fresh draws of the policy, judged by the reward",
        "rso": "is dpo or slic on pairs of draws that rejection kept: klimb data pairs RUN --from target, and learn_from data",
        "nash_md": "leads where ipo on fresh draws does, to ref exp(P(y beats pi) / beta): its opponent, a mixture with ref, is another way there",
        "xpo": "is dpo less alpha KL(ref||pi), optimism that moves the minimum off the target, and needs each draw's partner from ref",
        "rejection_fine_tuning": "is sft on draws of the rejection sampler, and keeps the target; raft does not",
        "vmpo": "keeps the better half of a batch: ranks across prompts, which no tilt of a reward follows",
        "gkd": "is distill with generalized_js(b); its lambda is 1 - teacher_draws",
        "distillm": "is distill with skew_kl(0.1) or skew_reverse_kl(0.1)",
        "minillm": "is distill with reverse_kl, teacher_draws 0 and sequence_gradient; over whole completions, reverse_kl",
        "k1_as_a_loss": "has an expected gradient of zero: it would train noise",
    }
)
"""name that people ask for -> what it is here"""


def method(name: str) -> Method:
    """The row of this name; a divergence with a number of one's own, as alpha(0.3), is a row too, and f_dpo of one.

    Raises:
        ValueError: no such row, the number is outside the divergence's domain, or f_dpo of one that does not fit.

    Example:
        >>> method("alpha(0.3)").objective.keywords["f"]
        'alpha(0.3)'
        >>> method("skew_kl(2)")
        Traceback (most recent call last):
        ...
        ValueError: skew_kl: got 2.0, expected a number strictly between 0 and 1 (0 is forward_kl, 1 is zero everywhere)
        >>> method("f_dpo(alpha(0.3))").claim
        'value'
    """
    if name in METHODS:
        return METHODS[name]
    stem, _, rest = name.partition("(")
    if stem == "f_dpo" and rest.endswith(")"):  # under KL(pi||ref) itself it is dpo
        return METHODS["dpo"] if rest == "reverse_kl)" else f_dpo(rest[:-1])
    if stem not in FAMILIES:
        raise ValueError(f"no method {name!r}{nearest(name, METHODS)}; klimb methods lists them")
    divergence(name)
    like = next(row for other, row in METHODS.items() if other.startswith(f"{stem}("))
    return replace(like, objective=partial(f_divergence, f=name, baseline=None))
