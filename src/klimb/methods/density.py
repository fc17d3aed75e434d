"""Methods that know the target's density, up to its normaliser or with it: divergences, squared residuals, candidates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from klimb.methods.row import Method
from klimb.objectives.candidates import exo, info_nca, nca
from klimb.objectives.f_divergence import f_divergence
from klimb.objectives.forward_kl import forward_kl
from klimb.objectives.log_variance import log_variance
from klimb.objectives.path_consistency import path_consistency
from klimb.objectives.reverse_kl import reverse_kl
from klimb.objectives.squared import length_normalised_balance, pmd_mean, trajectory_balance


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


DENSITY: Mapping[str, Method] = MappingProxyType(
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
    }
)
