"""The table of targets: what each maximises, which law that is, and where it stops being what people think."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


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
