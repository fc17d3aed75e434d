"""The table of methods: target x divergence x draws, with what each claims and where the claim ends.

`claim` says what a test of the row has to show. "gradient": its mean update is the divergence's gradient. "minimiser":
its minimum is the target. "value": its minimum is another law, which is named. "law": its draws have the law named. A
caveat is tested as well: by a case where a neighbour's belief fails.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from klimb.nearest import nearest
from klimb.numbers.advantages import (
    gae_advantage,
    group_centred,
    group_standardized,
    leave_one_out_advantage,
    returns,
    reward_less_kl,
    token_reward,
    whitened_reward_to_go,
)
from klimb.objectives.bind import lacking, name_of, wanted
from klimb.objectives.candidates import exo, info_nca, nca
from klimb.objectives.f_divergence import f_divergence
from klimb.objectives.forward_kl import forward_kl
from klimb.objectives.generators import FAMILIES, GENERATORS, divergence
from klimb.objectives.kl_penalty import CELLS, ESTIMATORS
from klimb.objectives.likelihood import dpg, filtered, raft, reward_weighted, sft
from klimb.objectives.log_variance import log_variance
from klimb.objectives.path_consistency import path_consistency
from klimb.objectives.penalised import penalised
from klimb.objectives.preference import chi_po, dpo, ipo, preference, slic, wpo
from klimb.objectives.reference_free import cpo, orpo, simpo
from klimb.objectives.reverse_kl import reverse_kl
from klimb.objectives.squared import length_normalised_balance, pmd_mean, trajectory_balance
from klimb.objectives.surrogate import cispo, dapo, dr_grpo, grpo, gspo, ppo, reinforce_pp, rloo
from klimb.objectives.unpaired import bco, kto, middle, zero_kl

Numbers = Callable[..., Tensor]

OF_THE_POLICY = frozenset(
    {"log_pi", "token_log_pi", "log_old", "token_log_old", "log_start", "row", "old_values"}
)
"""numbers that training has of any draws: the network's own, before and in an update, and a critic's"""
OF_THE_DRAWING_LAW = frozenset({"log_q", "log_old", "token_log_old"})
"""numbers by which a draw is weighed for the law that it came from"""


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        knows: how the target is known.
        divergence: what is made small, and by which estimator.
        draws: whose draws it takes.
        claim: what its test shows.
        fixed_point: the law at which it stops, where the family of policies is large enough.
        caveat: where the claim ends.
        source: authors, year.
        objective: the function of numbers that is minimised; None where nothing is trained.
        derived: further numbers the objective asks for (advantages), each a function of numbers, computed once for a
            batch of draws, in order; one may take the name of a number it replaces.
        unit: what the objective is in: "nats" (trained times beta), or "reward".
    """

    knows: str
    divergence: str
    draws: str
    claim: Literal["gradient", "minimiser", "value", "law"]
    fixed_point: str
    caveat: str
    source: str
    objective: Numbers | None = None
    derived: Mapping[str, Numbers] = field(default_factory=dict)
    unit: Literal["nats", "reward"] = "nats"

    def as_dict(self) -> dict[str, object]:
        """The row as plain text, for JSON and for print."""
        return {
            **{name: x for name, x in vars(self).items() if isinstance(x, str)},
            "objective": None if self.objective is None else name_of(self.objective),
            "derived": ", ".join(f"{name} = {name_of(function)}" for name, function in self.derived.items()),
        }


def _f_divergence(name: str, divergence: str, *, caveat: str, source: str = "Go et al., 2023") -> Method:
    """A row of `f_divergence`; a good log Z is the baseline, and leave-one-out beside it would be noise."""
    return Method(
        knows="density and log Z",
        divergence=f"{divergence}, score function",
        draws="the policy, or any known law",
        claim="gradient",
        fixed_point="the target",
        caveat=caveat,
        source=source,
        objective=partial(f_divergence, f=name, baseline=None),
    )


def _f_dpo(name: str) -> Method:
    """A row of `dpo` that scores by the slope of another divergence than KL(pi||ref)."""
    f = divergence(name)
    if f.leaves_out:
        raise ValueError(
            f"f_dpo({name}): got a divergence whose slope is finite where pi/ref = 0, so that its best policy may leave "
            "completions out, of which comparisons say nothing; expected one whose slope goes to -inf there: "
            f"{', '.join(x for x, g in GENERATORS.items() if not g.leaves_out)}, alpha below 1, skew_reverse_kl or "
            "generalized_js; chi_po has chi-squared beside KL"
        )
    return Method(
        knows="comparisons, of which the reward gives the chances",
        divergence="cross entropy of who wins, the slope f'(pi/ref) of any divergence for a score",
        draws="any of full support",
        claim="value",
        fixed_point="another: the best policy under beta D_f(pi||ref) in the place of KL, beta f'(pi/ref) = r - c",
        caveat="gap and share are of the tilt, which this is not; beta is a price on another divergence's nats; f'(0) must be -inf: "
        "not total_variation, chi2_reverse, skew_kl, alpha above 1",
        source="Wang et al., 2024",
        objective=partial(preference, score=f.slope),
    )


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "log_variance": Method(
            knows="density",
            divergence="half variance of the residual",
            draws="any of full support",
            claim="minimiser",
            fixed_point="the target",
            caveat="the gradient is that of KL(pi||p) only for fresh draws of the policy",
            source="Richter et al., 2020",
            objective=log_variance,
        ),
        "reverse_kl": Method(
            knows="density",
            divergence="KL(pi||p), score function, leave-one-out",
            draws="the policy, or any known law that reaches what it reaches",
            claim="gradient",
            fixed_point="the target",
            caveat="refuses forbidden completions (reward -inf)",
            source="Williams, 1992; Ahmadian et al., 2024",
            objective=reverse_kl,
        ),
        "forward_kl": Method(
            knows="density",
            divergence="KL(p||pi), self-normalised weights",
            draws="any known law",
            claim="minimiser",
            fixed_point="the target, as G grows",
            caveat="biased at finite G, towards the law that drew",
            source="Khalifa, Elsahar, Dymetman, 2021",
            objective=forward_kl,
        ),
        "jensen_shannon": _f_divergence(
            "jensen_shannon",
            "Jensen-Shannon",
            caveat="a wrong log Z turns the gradient, and leaves the minimum where it is",
        ),
        "total_variation": _f_divergence(
            "total_variation",
            "total variation",
            caveat="its gradient is a sign: noise does not fade at the target, and a wrong log Z moves where it stops",
        ),
        "chi2_reverse": _f_divergence(
            "chi2_reverse",
            "chi-squared of pi from p",
            caveat="a wrong log Z weighs prompts differently, and turns no prompt's gradient; far draws overflow",
        ),
        "chi2_forward": _f_divergence(
            "chi2_forward",
            "chi-squared of p from pi",
            caveat="a wrong log Z weighs prompts differently, and turns no prompt's gradient; explodes where the policy lacks what the target has",
        ),
        "squared_hellinger": _f_divergence(
            "squared_hellinger",
            "squared Hellinger distance",
            caveat="a wrong log Z weighs prompts differently, and turns no prompt's gradient",
        ),
        "alpha(0.5)": _f_divergence(
            "alpha(0.5)",
            "alpha divergence, any a but 0 and 1",
            caveat="a wrong log Z weighs prompts differently, and turns no prompt's gradient",
        ),
        "skew_kl(0.1)": _f_divergence(
            "skew_kl(0.1)",
            "KL(p||a p + (1 - a) pi), any a in (0, 1)",
            caveat="a wrong log Z turns the gradient, and leaves the minimum where it is",
            source="Lee, 2001; Ko et al., 2024",
        ),
        "skew_reverse_kl(0.1)": _f_divergence(
            "skew_reverse_kl(0.1)",
            "KL(pi||a pi + (1 - a) p), any a in (0, 1)",
            caveat="a wrong log Z turns the gradient, and leaves the minimum where it is; a forbidden completion costs at most -log a",
            source="Lee, 2001; Ko et al., 2024",
        ),
        "generalized_js(0.1)": _f_divergence(
            "generalized_js(0.1)",
            "generalised Jensen-Shannon, any b in (0, 1)",
            caveat="a wrong log Z turns the gradient, and leaves the minimum where it is",
            source="Agarwal et al., 2024",
        ),
        "trajectory_balance": Method(
            knows="density and log Z, known or learned",
            divergence="half the squared residual less log Z",
            draws="any of full support",
            claim="minimiser",
            fixed_point="the target",
            caveat="off the policy a wrong fixed log Z moves the minimum: too high, and what is rarely drawn gets the surplus",
            source="Malkin et al., 2022; Bartoldson et al., 2025",
            objective=trajectory_balance,
        ),
        "a_star_po": Method(
            knows="density and log Z = V* / beta from reference draws",
            divergence="half the squared residual less log Z",
            draws="the policy, one a prompt will do",
            claim="minimiser",
            fixed_point="the target",
            caveat="only with V* at the same beta, or fresh draws: V* at another beta, off the policy, leads elsewhere",
            source="Brantley et al., 2025",
            objective=trajectory_balance,
        ),
        "pmd_mean": Method(
            knows="density, mean reward for beta log Z",
            divergence="half the squared residual less the mean reward / beta",
            draws="any of full support",
            claim="value",
            fixed_point="another: beta log(pi/ref) + c pi/ref = r - mean r (Lambert W)",
            caveat="not the target; the mean of G draws shrinks the reward by (G - 1) / G",
            source="Kimi k1.5, 2025; Xu et al., 2026",
            objective=pmd_mean,
        ),
        "flow_rl": Method(
            knows="density by length, log Z learned",
            divergence="half the squared residual a token",
            draws="any of full support",
            claim="value",
            fixed_point="another: ref exp(length (r / beta - c))",
            caveat="length normalisation changes the target; without it, trajectory_balance",
            source="Zhu et al., 2025",
            objective=length_normalised_balance,
        ),
        "dpo": Method(
            knows="comparisons, of which the reward gives the chances",
            divergence="cross entropy of who wins, all pairs of a group",
            draws="any of full support",
            claim="minimiser",
            fixed_point="the target, where comparisons follow Bradley and Terry",
            caveat="labels that never err lead to certainty; rewards far apart say little of how far",
            source="Rafailov et al., 2023; Guo et al., 2024",
            objective=dpo,
        ),
        "ipo": Method(
            knows="comparisons, of which the reward gives the chances",
            divergence="squared distance of the margin from 1/2, all pairs of a group",
            draws="any of full support",
            claim="value",
            fixed_point="another: ref exp(P(y beats the drawing law) / beta)",
            caveat="follows chances of winning, not rewards, and so whom it is compared with",
            source="Azar et al., 2024",
            objective=ipo,
        ),
        "wpo": Method(
            knows="comparisons, of which the reward gives the chances",
            divergence="cross entropy of who wins, pairs weighted by how likely the policy is to write them",
            draws="any of full support",
            claim="minimiser",
            fixed_point="the target, where comparisons follow Bradley and Terry",
            caveat="the weights fade with a policy's entropy: little is learned from what it would not write",
            source="Zhou et al., 2024",
            objective=wpo,
        ),
        "slic": Method(
            knows="comparisons, of which the reward gives the chances",
            divergence="what is missing to a margin of 1, all pairs of a group",
            draws="any of full support",
            claim="value",
            fixed_point="another: margins of 1 for whatever wins more often, however much more",
            caveat="a kink for a loss: beyond the margin nothing is learned",
            source="Zhao et al., 2023; Liu et al., 2024",
            objective=slic,
        ),
        "chi_po": Method(
            knows="comparisons, of which the reward gives the chances",
            divergence="cross entropy of who wins, pi/ref + log pi/ref for a score",
            draws="any of full support",
            claim="value",
            fixed_point="another: the best policy under KL and chi-squared, which stays nearer to ref",
            caveat="a penalty beside KL at the same beta: less reward, less trust in rare draws",
            source="Huang et al., 2024",
            objective=chi_po,
        ),
        "f_dpo(jensen_shannon)": _f_dpo("jensen_shannon"),
        "simpo": Method(
            knows="comparisons, of which the reward gives the chances",
            divergence="cross entropy of who wins by mean log-probability a token, less a margin",
            draws="any of full support",
            claim="value",
            fixed_point="another: no reference, tilted as often as a completion has tokens",
            caveat="nothing holds it near ref but few steps",
            source="Meng, Xia, Chen, 2024",
            objective=simpo,
        ),
        "cpo": Method(
            knows="comparisons, of which the reward gives the chances",
            divergence="cross entropy of who wins by log-probability, and the winner's likelihood",
            draws="any of full support",
            claim="value",
            fixed_point="another: a uniform reference, pulled to the winners",
            caveat="nothing holds it near ref but few steps",
            source="Xu et al., 2024",
            objective=cpo,
        ),
        "orpo": Method(
            knows="comparisons, of which the reward gives the chances",
            divergence="the winner's likelihood, and the log odds of who wins",
            draws="any of full support",
            claim="value",
            fixed_point="another: near the law of the winners",
            caveat="beta has no part in it; nothing holds it near ref but few steps",
            source="Hong, Lee, Thorne, 2024",
            objective=orpo,
        ),
        "kto": Method(
            knows="the chance that a completion is called good",
            divergence="what is missing to the full value of each draw, a curve that flattens",
            draws="any of full support",
            claim="value",
            fixed_point="none inside: what is called good more often than bad goes to certainty",
            caveat="needs rewards from 0 to 1, or labels; noise in them is not weighed, only outvoted",
            source="Ethayarajh et al., 2024",
            objective=kto,
            derived={"held_against": zero_kl},
        ),
        "bco": Method(
            knows="the chance that a completion is called good",
            divergence="cross entropy of good and bad, each draw by itself",
            draws="any of full support",
            claim="value",
            fixed_point="another: near ref exp(logit(chance) / beta), where its middle is log Z of that",
            caveat="needs rewards from 0 to 1, or labels; the middle of both classes is not log Z",
            source="Jung et al., 2024",
            objective=bco,
            derived={"held_against": middle},
        ),
        "exo": Method(
            knows="density",
            divergence="KL(pi||p) between the group's draws, each law relative to ref",
            draws="any of full support",
            claim="minimiser",
            fixed_point="the target",
            caveat="the gradient is that of KL(pi||p) only for many draws of the reference",
            source="Ji et al., 2024",
            objective=exo,
        ),
        "info_nca": Method(
            knows="density",
            divergence="KL(p||pi) between the group's draws, each law relative to ref",
            draws="any of full support",
            claim="minimiser",
            fixed_point="the target",
            caveat="only ratios within a group count: a good draw's likelihood can fall",
            source="Chen et al., 2024",
            objective=info_nca,
        ),
        "nca": Method(
            knows="density",
            divergence="each draw against noise, target's or group's",
            draws="the reference",
            claim="value",
            fixed_point="the target, as G grows",
            caveat="at finite G it falls short; on draws of another law it is off",
            source="Chen et al., 2024",
            objective=nca,
        ),
        "path_consistency": Method(
            knows="density and a learned soft value of each prefix",
            divergence="half the squared inconsistency of every suffix",
            draws="any of full support",
            claim="minimiser",
            fixed_point="the target, and the soft values",
            caveat="values must be soft, log E exp and not E; long completions count more",
            source="Nachum et al., 2017",
            objective=path_consistency,
        ),
        "sft": Method(
            knows="samples",
            divergence="KL(p||pi), likelihood",
            draws="a data set, or a sampler of the target",
            claim="gradient",
            fixed_point="the law of the draws",
            caveat="on draws of the policy itself it learns nothing; on best-of-n draws it learns best-of-n",
            source="Fisher, 1912",
            objective=sft,
        ),
        "reward_weighted": Method(
            knows="rewards",
            divergence="KL of the tilted drawing law from pi, likelihood",
            draws="the policy of the last round, or any",
            claim="value",
            fixed_point="the tilt of the law that drew, not of the reference",
            caveat="k rounds on the policy lead to beta / k, past the target",
            source="Peters, Schaal, 2007; Abdolmaleki et al., 2018",
            objective=reward_weighted,
        ),
        "raft": Method(
            knows="ranks",
            divergence="likelihood of the best of each group",
            draws="the policy of the last round, or the reference",
            claim="value",
            fixed_point="best of G of the law that drew",
            caveat="follows ranks, not rewards; round after round it ends on one completion",
            source="Dong et al., 2023",
            objective=raft,
        ),
        "filtered": Method(
            knows="which rewards pass a threshold",
            divergence="likelihood of the draws that pass",
            draws="the policy of the last round, or the reference",
            claim="value",
            fixed_point="the drawing law where the reward passes",
            caveat="the target at no beta above zero; prompts of rare success count less",
            source="Zelikman et al., 2022; Yuan et al., 2023",
            objective=partial(filtered, threshold=0.5),
        ),
        "dpg": Method(
            knows="density and log Z",
            divergence="KL(p||pi), unnormalised weights with baseline",
            draws="the policy, or any known law",
            claim="gradient",
            fixed_point="the target",
            caveat="a wrong log Z weighs prompts differently, and turns no prompt's gradient; weights p / q have a heavy tail",
            source="Parshakova et al., 2019; Korbak et al., 2022",
            objective=dpg,
        ),
        "rloo": Method(
            knows="density",
            divergence="KL(pi||p) in the reward, leave-one-out, sequence ratio",
            draws="the policy, some updates old",
            claim="gradient",
            fixed_point="the target",
            caveat="stale draws need the whole ratio: no clip here, so few updates a batch",
            source="Ahmadian et al., 2024",
            objective=rloo,
            derived={"reward": reward_less_kl, "advantage": leave_one_out_advantage},
            unit="reward",
        ),
        "ppo": Method(
            knows="density",
            divergence="KL(pi||p) in the reward a token, critic, clipped ratio",
            draws="the policy, some updates old",
            claim="gradient",
            fixed_point="the target, up to clip and critic",
            caveat="after the first inner step it is proximal: a clipped draw says nothing more; lambda below 1 believes the critic; whitening few draws biases",
            source="Schulman et al., 2017; Ziegler et al., 2019",
            objective=ppo,
            derived={"token_reward": token_reward, "token_advantage": gae_advantage, "returns": returns},
            unit="reward",
        ),
        "grpo": Method(
            knows="density, beta divided by the group's deviation",
            divergence="reward by clipped ratio, k3 of each token as a loss, mean over tokens",
            draws="the policy, some updates old",
            claim="value",
            fixed_point="another: a forward KL to the reference in place of the reverse, a beta a prompt",
            caveat="three: the deviation rescales beta, k3 as a loss is the forward KL, the mean over tokens favours long failures",
            source="Shao et al., 2024",
            objective=grpo,
            derived={"advantage": group_standardized},
            unit="reward",
        ),
        "dr_grpo": Method(
            knows="rewards",
            divergence="reward by clipped ratio, sum over tokens",
            draws="the policy, some updates old",
            claim="value",
            fixed_point="none inside: certainty of the best completion",
            caveat="no price on KL, so no target; unbiased for the gradient of the reward up to (G - 1) / G",
            source="Liu et al., 2025",
            objective=dr_grpo,
            derived={"advantage": group_centred},
            unit="reward",
        ),
        "dapo": Method(
            knows="rewards",
            divergence="reward by clipped ratio, clip higher, mean over the group's tokens",
            draws="the policy, some updates old",
            claim="value",
            fixed_point="none inside: certainty of the best completion",
            caveat="no price on KL, so no target; dropping groups without spread changes which prompts count",
            source="Yu et al., 2025",
            objective=dapo,
            derived={"advantage": group_standardized},
            unit="reward",
        ),
        "gspo": Method(
            knows="rewards",
            divergence="reward by clipped geometric-mean ratio",
            draws="the policy, some updates old",
            claim="value",
            fixed_point="none inside: certainty of the best completion",
            caveat="no price on KL, so no target; the ratio is a token's on average, not the sequence's",
            source="Zheng et al., 2025",
            objective=gspo,
            derived={"advantage": group_standardized},
            unit="reward",
        ),
        "cispo": Method(
            knows="rewards",
            divergence="likelihood weighted by a capped, fixed ratio",
            draws="the policy, some updates old",
            claim="value",
            fixed_point="none inside: certainty of the best completion",
            caveat="no price on KL, so no target; the cap biases, and no token falls silent",
            source="MiniMax, 2025",
            objective=cispo,
            derived={"advantage": group_standardized},
            unit="reward",
        ),
        "reinforce_pp": Method(
            knows="density",
            divergence="KL(pi||p) in the reward a token, whitened over the batch",
            draws="the policy, some updates old",
            claim="value",
            fixed_point="near the target",
            caveat="whitening over few draws and the mean over tokens bias it; after the first inner step it is proximal: a clipped draw says nothing more",
            source="Hu, 2025",
            objective=reinforce_pp,
            derived={"token_reward": token_reward, "token_advantage": whitened_reward_to_go},
            unit="reward",
        ),
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
        return METHODS["dpo"] if rest == "reverse_kl)" else _f_dpo(rest[:-1])
    if stem not in FAMILIES:
        raise ValueError(f"no method {name!r}{nearest(name, METHODS)}; klimb methods lists them")
    divergence(name)
    like = next(row for other, row in METHODS.items() if other.startswith(f"{stem}("))
    return replace(like, objective=partial(f_divergence, f=name, baseline=None))


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
        >>> weighs_by_law(reverse_kl), weighs_by_law(log_variance)
        (True, False)
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


@dataclass(frozen=True)
class Destination:
    """A row of the table of targets: what is maximised, which law that is, and where it stops being what people think.

    Attributes:
        maximises: the objective that the law maximises.
        law: the target, up to its normaliser.
        caveat: what to mind.
        source: authors, year.
    """

    maximises: str
    law: str
    caveat: str
    source: str


TARGETS: Mapping[str, Destination] = MappingProxyType(
    {
        "tilt": Destination(
            maximises="E r - beta KL(pi||ref)",
            law="ref exp(r / beta)",
            caveat="no target at beta = 0",
            source="Korbak, Perez, Buckley, 2022",
        ),
        "entropy_bonus": Destination(
            maximises="E r - beta KL(pi||ref) + bonus H(pi)",
            law="(ref exp(r / beta)) to the power beta / (beta + bonus)",
            caveat="another reference, flatter than ref: at r = 0 it is not ref",
            source="Haarnoja et al., 2018",
        ),
        "moving_reference": Destination(
            maximises="E r - step KL(pi||the last round's policy)",
            law="the last policy times exp(r / step)",
            caveat="k rounds are the tilt of ref at step / k: without an anchor beta goes to zero",
            source="Gorbatovski et al., 2024",
        ),
        "standardized": Destination(
            maximises="E r / sd - beta KL(pi||ref)",
            law="ref exp(r / (beta sd)), a beta a prompt",
            caveat="with the policy's own sd and rewards of 0 and 1 there may be no fixed point inside",
            source="Shao et al., 2024; Mroueh, 2025",
        ),
        "length_normalized": Destination(
            maximises="E r / length - beta KL(pi||ref)",
            law="ref exp(r / (length beta))",
            caveat="a constant added to r moves it: long completions pay less for a negative reward",
            source="Meng, Xia, Chen, 2024",
        ),
        "mixture": Destination(
            maximises="E r - beta KL(pi||(1 - a) ref + a other)",
            law="((1 - a) ref + a other) exp(r / beta)",
            caveat="needs both policies' log-probabilities of every draw",
            source="klimb",
        ),
        "geometric_mixture": Destination(
            maximises="-(1 - a) KL(pi||ref) - a KL(pi||other)",
            law="ref^(1 - a) other^a; of a tilt at beta, the tilt at beta / a",
            caveat="of sequences: mixing logits token by token is only near it",
            source="Liu et al., 2024",
        ),
        "chi_squared": Destination(
            maximises="E r - (beta / 2) chi2(pi||ref)",
            law="ref relu((r - nu) / beta)",
            caveat="zero where the reward is low: forward_kl only; beta KL(pi||p) is not its gap",
            source="Huang et al., 2025",
        ),
        "forbid": Destination(
            maximises="E r - beta KL(pi||ref), forbidden completions excluded",
            law="ref exp(r / beta) where allowed",
            caveat="-inf: forward_kl, dpg and the divergences that stay finite there",
            source="Khalifa, Elsahar, Dymetman, 2021",
        ),
        "moment_tilt": Destination(
            maximises="-KL(pi||ref) with the means of features fixed",
            law="ref exp(lambda . features), lambda by Newton on the dual",
            caveat="a goal outside what the pool reaches has no lambda, and is refused",
            source="Khalifa, Elsahar, Dymetman, 2021",
        ),
    }
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
