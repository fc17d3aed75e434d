"""What every objective asks of its numbers: one shape [P, G], and no NaN or infinity that nobody meant."""

from __future__ import annotations

import torch
from torch import Tensor

ADVICE = {  # what minus infinity means there, and what to do
    "log_target": "The target forbids a draw that the policy can make, so KL(pi||p) is infinite: use forward_kl, "
    "which takes forbidden draws, or a finite reward.",
    "log_pi": "The policy cannot make this draw: check that it is scored as it was drawn.",
    "log_q": "Nothing is drawn with probability zero: check the law that the sampler states.",
}


def require_finite(objective: str, **numbers: Tensor) -> None:
    """Refuse numbers that are not all finite and of one shape [P, G].

    Args:
        objective: the name to complain in.
        **numbers: [P, G] each, by the name the user knows them by.

    Raises:
        ValueError: a shape differs from the first one's, or is not [P, G]; or a number is NaN or infinite.

    Example:
        >>> require_finite("reverse_kl", log_pi=torch.zeros(2, 3), log_target=torch.zeros(2, 1))
        Traceback (most recent call last):
        ValueError: reverse_kl: got log_target of shape [2, 1], expected [2, 3] like log_pi: one number a draw
    """
    first, shape = next((name, x.shape) for name, x in numbers.items())
    for name, x in numbers.items():
        if x.ndim != 2:
            raise ValueError(
                f"{objective}: got {name} of shape {list(x.shape)}, expected [P, G]: prompts, draws"
            )
        if x.shape != shape:
            raise ValueError(
                f"{objective}: got {name} of shape {list(x.shape)}, expected {list(shape)} like {first}: "
                "one number a draw"
            )
        bad = x[~torch.isfinite(x)]
        if bad.numel():
            value = bad[0].item()
            hint = ADVICE.get(name, "") if value == float("-inf") else ""
            raise ValueError(
                f"{objective}: got {name} = {value}, expected finite numbers in nats. {hint}".rstrip()
            )


def require_clip(objective: str, clip: float | None) -> None:
    """Refuse a clip that would clip everything away.

    Raises:
        ValueError: `clip` is given and is not above zero.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"{objective}: got clip = {clip}, expected more than 0 nats, or None not to clip")
