"""Methods that know which completion is better, or which is called good: pairs, and labels of single draws."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from klimb.methods.row import Method
from klimb.objectives.generators import GENERATORS, divergence
from klimb.objectives.preference import chi_po, dpo, ipo, preference, slic, wpo
from klimb.objectives.reference_free import cpo, orpo, simpo
from klimb.objectives.unpaired import bco, kto, middle, zero_kl


def f_dpo(name: str) -> Method:
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


COMPARISONS: Mapping[str, Method] = MappingProxyType(
    {
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
        "f_dpo(jensen_shannon)": f_dpo("jensen_shannon"),
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
    }
)
