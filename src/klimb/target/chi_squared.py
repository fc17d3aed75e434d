"""A chi-squared penalty instead of KL: the density ratio rises linearly with the reward and stops at zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.data import Policy, Reward, Scored
from klimb.numbers.tilt import shares
from klimb.target.tilt import require_beta


@dataclass(frozen=True)
class ChiSquaredTarget:
    """The maximiser of E[r] - (beta / 2) chi2(pi||reference); see `chi_squared`.

    Attributes:
        reference: the policy that is reweighted.
        reward: what is good.
        beta: units of reward per unit of pi / ref.
    """

    reference: Policy
    reward: Reward
    beta: float

    def threshold(self, scored: Scored) -> Tensor:
        """[P] nu, units of reward: completions of at most this reward have no probability.

        E_ref relu((r - nu) / beta) = 1. Every set of draws bounds nu from below by (E[r; set] - beta) / P(set), with
        equality at the set {r > nu}; so nu is the largest of these over the best 1, 2, ..., G draws.
        """
        assert scored.log_ref is not None
        assert scored.reward is not None
        if scored.log_q is None:
            raise ValueError(
                "chi_squared: got draws of an unknown law, expected log_q: the threshold is a mean under the reference"
            )
        weight = shares((scored.log_ref - scored.log_q).double())
        reward, order = scored.reward.double().sort(-1, descending=True)
        weight = weight.gather(-1, order)
        seen = (reward > -torch.inf) & (weight > 0)
        if not seen.any(-1).all():
            raise ValueError(
                "chi_squared: every draw of a prompt is forbidden (reward -inf), so it has no target"
            )
        mass = weight.cumsum(-1)
        total = (weight * torch.where(seen, reward, 0.0)).cumsum(-1)
        bounds = torch.where(seen, (total - self.beta) / mass, -torch.inf)
        return bounds.amax(-1).to(scored.reward)

    def log_target(self, scored: Scored) -> Tensor:
        """[P, G] log ref + log relu((r - nu) / beta), nats; -inf where r <= nu. Its log Z is 0, up to noise in nu."""
        nu = self.threshold(scored)
        assert scored.log_ref is not None
        assert scored.reward is not None
        return scored.log_ref + ((scored.reward - nu[..., None]).clamp_min(0.0) / self.beta).log()


def chi_squared(reference: Policy, reward: Reward, beta: float) -> ChiSquaredTarget:
    r"""The target of a chi-squared penalty: no completion gains more than in proportion to its reward.

    $$ \arg\max_\pi E_\pi[r] - \tfrac\beta2\,\chi^2(\pi\|ref) = ref\; relu\big((r-\nu)/\beta\big), \qquad
       \chi^2(\pi\|ref) = E_{ref}[(\pi/ref)^2] - 1, \quad E_{ref}\,relu\big((r-\nu)/\beta\big) = 1 $$

    nu is solved exactly for each prompt from the draws at hand, weighted to the reference by log ref - log q: consistent,
    with few draws noisy, and too low where beta is small (the best there are were not drawn). Where beta is at least
    E_ref[r] minus the worst reward nothing is cut off: nu = E_ref[r] - beta, E_p[r] = E_ref[r] + Var_ref(r) / beta,
    chi2 = Var_ref(r) / beta^2, and the law agrees with the plain tilt to first order in 1 / beta. Below that it has
    zeros: forward_kl takes them, reverse_kl and log_variance refuse them by name.

    What is left to climb is (beta / 2) E_ref[(pi/ref - p/ref)^2] + E_pi[relu(nu - r)], not beta KL(pi||p): the
    certificate does not apply. For plan use the numbers here (draws from the reference, `threshold`).

    Args:
        reference: the policy that is reweighted.
        reward: under TRL's contract; -inf forbids.
        beta: units of reward per unit of density ratio, > 0.

    Raises:
        ValueError: beta is not positive; the law of the draws is not known; every draw of a prompt is forbidden.

    Example:
        >>> uniform = torch.full((1, 4), 0.25).log()
        >>> scored = Scored(log_ref=uniform, log_q=uniform, reward=torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
        >>> target = chi_squared(None, None, 1.0)
        >>> target.threshold(scored), target.log_target(scored).exp()
        (tensor([0.6667]), tensor([[0.0000, 0.0833, 0.3333, 0.5833]]))

    Source: Huang et al., "Is best-of-n the best of them? Coverage, scaling, and optimality in inference-time
    alignment", 2025 (this law by rejection); the sort is that of Martins and Astudillo, "From softmax to sparsemax", 2016.

    Not the same as chi-PO (Huang et al., 2024), which penalises chi2 and KL together and has no zeros; nor as the
    chi-squared divergence as a training objective, which goes to the plain tilt.
    """
    require_beta(beta)
    return ChiSquaredTarget(reference, reward, float(beta))
