"""The reward that a trained policy implies: beta log pi/ref, whose best policy at that beta is the policy itself.

Whatever it was trained by, pi = ref exp(r / beta) with log Z = 0. So a policy learned from comparisons has a reward that can be
planned with, measured against, and held beside the reward that judged the comparisons.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from klimb.data import Draws, Example, Prompt
from klimb.models.families import adapter_config
from klimb.models.hub import DTYPES, load_model, resolve
from klimb.models.policy import CausalPolicy, check_head
from klimb.models.trained import load_trained
from klimb.nearest import nearest_run
from klimb.rewards.model import folder_hash


@dataclass(frozen=True)
class Implied:
    """A reward that is a policy; called under the contract of `klimb.rewards.load`, with the tokens that were drawn.

    Attributes:
        policy: pi.
        reference: ref.
        beta: units of reward per nat.
        source_hash: sha256 of the files of both and of beta.
        name: what it is called in tables.
    """

    policy: CausalPolicy = field(repr=False)
    reference: CausalPolicy = field(repr=False)
    beta: float
    source_hash: str
    name: str = "implied"

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
    ) -> list[float]:
        """Give beta log pi/ref of each completion, token for token.

        Raises:
            ValueError: the tokens were drawn from a model of other words.
        """
        ids = [torch.tensor(one, dtype=torch.int64) for one in completion_ids]
        for one, completion in zip(ids, completions, strict=True):
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            if self.policy.decode(one) != text:
                raise ValueError(
                    f"the tokens of {text[:60]!r} read {self.policy.decode(one)[:60]!r} in the policy's tokenizer; expected draws of a "
                    "model of the same tokenizer"
                )
        # the completions of one prompt stand together, and the prompt is read once for all of them
        runs = [len(list(group)) for _, group in groupby(prompts)]
        size = math.gcd(*runs) or 1
        groups = [ids[start : start + size] for start in range(0, len(ids), size)]
        draws = Draws(
            [Example(prompt) for prompt in prompts[::size]],
            groups,
            finished=torch.ones(len(groups), size, dtype=torch.bool),
        )
        log_pi, log_ref = (draws.sequence_sums(who.log_prob(draws)) for who in (self.policy, self.reference))
        return (self.beta * (log_pi - log_ref)).flatten().tolist()


def implied(
    *,
    policy: str,
    beta: float | None = None,
    reference: str | None = None,
    dtype: Literal["bfloat16", "float32", "float64", "float16"] | None = None,
    device: str | None = None,
) -> Implied:
    """Load a trained policy and its reference as a reward.

    Args:
        policy: the directory of a run, which says all the rest; its folder `policy`; or another folder of a peft adapter or of a whole
            model.
        beta: units of reward per nat; left out, the run's.
        reference: what the policy is relative to; left out, the run's, or the model that an adapter was trained on.
        dtype: of the weights; left out, as the run had it.
        device: cpu, cuda, ...; left out: cuda if there is one.

    Raises:
        ValueError: no such folder, no beta, no reference, or a reference of another tokenizer.

    Source: Rafailov et al., "Direct preference optimization: your language model is secretly a reward model", 2023.

    Not the same as `klimb.target.implied_reward`, which is that of a target, beta log p/ref.
    """
    folder = Path(os.path.expanduser(policy))
    if not folder.is_dir():
        raise ValueError(
            f"reward implied: {policy}: no such folder{nearest_run(folder)}; expected a run or a trained policy"
        )
    run = next((where for where in (folder, folder.parent) if (where / "config.yaml").is_file()), None)
    said = {} if run is None else yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    if run == folder:
        folder = folder / "policy"
    beta = said.get("beta") if beta is None else beta
    if beta is None or not (math.isfinite(beta) and beta > 0):
        raise ValueError(
            f"reward implied: {policy}: got beta {beta}, expected a positive number, reward per nat; give the option beta"
        )
    trained_on = (adapter_config(folder) or {}).get("base_model_name_or_path")
    base = said.get("model_name_or_path") or trained_on or reference
    if base is None:
        raise ValueError(
            f"reward implied: {policy}: a whole model, of no run that would say where it began; give the option reference"
        )
    other = reference or said.get("reference")
    dtype = dtype or said.get("dtype")
    options: dict[str, Any] = {
        "dtype": None if dtype is None else DTYPES[dtype],
        "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
    }
    model, tokenizer = load_model(base, revision=said.get("model_revision", "main"), **options)
    start = said.get("family", {}).get("start")
    moved, began = load_trained(folder, model, tokenizer, start=start, **options)
    sources = [folder_hash(folder, model.config), folder_hash(Path(resolve(base)), model.config, str(start))]
    if other is not None and other != base:
        model, words = load_model(other, **options)
        if words.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"reward implied: reference {other}: its tokenizer has other words than that of {base}; expected a model of the same "
                "tokenizer"
            )
        began = CausalPolicy(model, words)
        check_head(began)
        sources.append(folder_hash(Path(resolve(other)), model.config))
    known = json.dumps([*sources, beta, dtype])
    return Implied(moved, began, beta, hashlib.sha256(known.encode()).hexdigest())
