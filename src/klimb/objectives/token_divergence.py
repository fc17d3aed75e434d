r"""How far the policy's law of the next token is from a teacher's, over the whole vocabulary, and its gradient.

n prefixes, V tokens. Both directions are exact for a prefix: what is random is only which prefixes are visited. By the chain rule

    KL(p||pi) = E_{y ~ p}  sum_t KL(p_t||pi_t)          prefixes of the teacher
    KL(pi||p) = E_{y ~ pi} sum_t KL(pi_t||p_t)          prefixes of the policy

so `forward_kl` on the teacher's draws has the gradient of KL(p||pi) itself. `reverse_kl` on the policy's draws has the right value, and
the gradient with the visited prefixes held fixed: what a token does to later prefixes is left out. `what_follows` is that part: with

    grad E_{y ~ pi} sum_t D_t  =  E_{y ~ pi} sum_t (grad D_t + grad log pi(y_t) sum_{s > t} D_s)

any divergence on the policy's own prefixes has its whole gradient. Other pairings and other divergences are objectives whose
minimum is p too, where the family holds it, and no divergence between laws of completions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klimb.objectives.generators import divergence

FAR = 60.0
"""log ratios are cut here for the divergences but the KLs, whose exponentials would overflow"""


def token_divergence(
    log_pi: Tensor, log_p: Tensor, *, f: str = "forward_kl", top_k: int | None = None
) -> Tensor:
    r"""The divergence of the policy's next token from the teacher's, a number a prefix.

    $$ D_f(\pi_t \| p_t) = \sum_v p_t(v)\, f(\pi_t(v) / p_t(v)) $$

    Args:
        log_pi: [n, V] log-probabilities of the policy, nats; differentiated.
        log_p: [n, V] of the teacher, nats.
        f: forward_kl is KL(p||pi), reverse_kl is KL(pi||p); any other of `klimb.objectives.generators.divergence`.
        top_k: keep the teacher's k likeliest tokens and put all others together as one: a lower bound, and still a divergence.

    Returns:
        [n] nats.

    Raises:
        ValueError: no such divergence, or shapes differ.

    Example:
        >>> law = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> uniform = torch.full((1, 3), 1 / 3).log()
        >>> token_divergence(uniform, law), token_divergence(uniform, law, f="reverse_kl")
        (tensor([0.0589]), tensor([0.0566]))
        >>> token_divergence(uniform, law, top_k=1)  # of 1/2 and the rest
        tensor([0.0589])

    Source: Kim, Rush, "Sequence-level knowledge distillation", 2016; Agarwal et al., "On-policy distillation of language models",
    2024; Wen et al., "f-divergence minimization for sequence-level knowledge distillation", 2023.

    Not the same as TRL's generalised JSD, whose beta is the share of the teacher: its 0 and 1 are these two KLs.
    """
    if log_pi.shape != log_p.shape or log_pi.ndim != 2:
        raise ValueError(
            f"token_divergence: got log_pi of shape {list(log_pi.shape)} and log_p of shape {list(log_p.shape)}, expected "
            "[n, V] of both: the same vocabulary"
        )
    if top_k is not None and top_k < log_p.shape[1]:
        log_p, kept = log_p.topk(top_k, 1)
        log_p, log_pi = _with_rest(log_p), _with_rest(log_pi.gather(1, kept))
    if f == "forward_kl":
        return (log_p.exp() * (log_p - log_pi)).sum(1)
    if f == "reverse_kl":
        return (log_pi.exp() * (log_pi - log_p)).sum(1)
    x = (log_pi - log_p).clamp(-FAR, FAR)
    return (log_pi.exp() * divergence(f).value(x)).sum(1)


def _with_rest(log_kept: Tensor) -> Tensor:
    """[n, k] -> [n, k + 1]: the mass that is left, as one more token."""
    rest = (1 - log_kept.exp().sum(1, keepdim=True)).clamp(min=torch.finfo(log_kept.dtype).eps)
    return torch.cat([log_kept, rest.log()], 1)


def what_follows(divergence: Tensor, lengths: Tensor) -> Tensor:
    r"""How much divergence comes after each token, less what comes after that place in the prompt's other completions.

    $$ c_{gt} = \sum_{s > t} D_{gs} - \frac{1}{G - 1} \sum_{h \neq g} \sum_{s > t} D_{hs} $$

    Times grad log pi of each token, and with the gradient of the divergence itself, this is an unbiased estimate of the gradient
    of the expected sum over the prefixes that the policy visits: with D_t = KL(pi_t||p_t) that of KL(pi||p). With one completion a
    prompt nothing is subtracted.

    Args:
        divergence: [N] of each packed token's prefix, nats, of draws from the policy as it is.
        lengths: [P, G] tokens.

    Returns:
        [N] nats, detached.

    Example:
        >>> what_follows(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([[3, 1]]))
        tensor([ 6.,  4.,  0., -6.])
        >>> what_follows(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([[2, 2]]))
        tensor([-6.,  0.,  6.,  0.])

    Source: Gu, Dong, Wei, Huang, "MiniLLM: knowledge distillation of large language models", 2024, eq. 4 (single-step decomposition).

    Not the same as MiniLLM's training, which sums log-ratios of the tokens drawn where this sums whole divergences (the same mean, more
    noise), divides by the tokens that follow (another objective) and draws from a mixture of policy and teacher.
    """
    num_draws = lengths.shape[1]
    lengths = lengths.to(divergence.device)
    here = torch.arange(int(lengths.max()), device=divergence.device) < lengths[..., None]
    padded = divergence.new_zeros(here.shape).masked_scatter(here, divergence.detach())
    after = padded.flip(2).cumsum(2).flip(2) - padded
    if num_draws > 1:
        after = (after - after.mean(1, keepdim=True)) * (num_draws / (num_draws - 1))
    return after[here]
