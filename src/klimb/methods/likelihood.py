"""Methods that raise the likelihood of draws, all alike, of some, or each by its weight."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from klimb.methods.row import Method
from klimb.objectives.likelihood import dpg, filtered, raft, reward_weighted, sft

LIKELIHOOD: Mapping[str, Method] = MappingProxyType(
    {
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
    }
)
