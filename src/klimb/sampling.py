"""Draws from a configuration, without a training: completions of the held-out prompts, and the file of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from klimb import store
from klimb.beginning import hold
from klimb.config import Config
from klimb.data import Draws, Example, Pool
from klimb.loaded import depends, generator_for, prepare
from klimb.numbers.estimate import mean_estimate
from klimb.pool import alone, handed_over
from klimb.ranks import ALONE, Ranks
from klimb.rewards.score import asked_alone
from klimb.sample import sample
from klimb.samplers.best_of import best_of
from klimb.samplers.rejection import rejection
from klimb.target import tilt
from klimb.watch import UNWATCHED, Watch


def run_sample(
    config: Config,
    *,
    output_dir: str | Path,
    method: str = "ancestral",
    num_draws: int = 1,
    n: int = 4,
    bound: float | None = None,
    limit: int | None = None,
    policy_folder: str | Path | None = None,
    watch: Watch = UNWATCHED,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Draw completions of the held-out prompts into draws/sample.parquet, without training anything; what is in it.

    An older file is replaced. Each block of prompts is kept as soon as it is scored: what was killed draws only the rest when it is
    called again as before. The file says verb "sample" of draws of the reference itself, which a plan can rest on, else sample- and the law.

    Args:
        config: names model, reward, prompts and, for rejection, beta.
        output_dir: of a run, or any other folder.
        method: "ancestral" from the policy in `policy_folder` (without one, from the starting policy); "best_of" and
            "rejection" from the reference.
        num_draws: completions a prompt.
        n: candidates of best_of.
        bound: an upper bound of the reward, for rejection.
        limit: at most this many prompts.
        policy_folder: what `from_pretrained` loads.
        watch: who looks on.
        ranks: who shares the work; every one of them has to call this, and the first one writes.

    Raises:
        ValueError: an unknown method, rejection without bound or beta, or draws of something else that a killed call left.
    """
    _check(config, method, bound)
    loaded = ranks.together(partial(prepare, config, policy_folder=policy_folder, ranks=ranks))
    watch = watch if ranks.first else UNWATCHED
    policy = loaded.policy if method == "ancestral" else loaded.reference
    own = handed_over(loaded.sampler, policy)
    # each rank draws blocks of its own
    target = tilt(alone(loaded.reference), asked_alone(loaded.reward), config.beta or 1.0)

    def kept(_: Any, examples: Sequence[Example], num_draws: int, *, generator: Any) -> Draws:
        assert bound is not None
        return rejection(
            target.reference,
            examples,
            num_draws,
            generator=generator,
            sampler=own,
            target=target,
            bound=bound,
        )

    samplers: dict[str, Any] = {
        "ancestral": own,
        "best_of": partial(best_of, sampler=own, reward=target.reward, n=n),
        "rejection": kept,
    }
    # a policy that nobody has moved is the reference, unless that is another model
    untrained = policy_folder is None and config.reference is None
    law = method if method != "ancestral" else "" if untrained else "policy"
    examples = loaded.test_examples[:limit]
    start = f"{config.model_name_or_path} {config.family}"
    of_law: dict[str, dict[str, Any]] = {
        "ancestral": {"policy": start if policy_folder is None else store.hash_of(policy_folder)},
        "best_of": {"n": n},
        "rejection": {"bound": bound, "beta": config.beta},
    }
    rest = {"method": method, **of_law[method], **depends(loaded, examples, num_draws)}
    path = store.draws_path(output_dir, "sample")
    with ExitStack() as until_done:
        ranks.from_first(partial(hold, Path(output_dir), until_done, watch))
        begin = partial(
            store.begin_parts, path, verb=f"sample-{law}" if law else "sample", hashes=loaded.hashes
        )
        parts = ranks.from_first(partial(begin, depends=rest))
        try:
            pool = sample(
                examples,
                policy,
                samplers[method],
                num_draws=num_draws,
                generator=generator_for(config.seed, "sample"),
                target=target,
                progress=watch.progress,
                parts=parts,
            )
        except ValueError:
            if ranks.first and not parts.done():
                _leave_nothing(path)
            raise
        ranks.from_first(partial(_merge, parts))
    return _record(path, pool)


def _check(config: Config, method: str, bound: float | None) -> None:
    if config.method == "reward_model":
        raise ValueError(
            "sample: a reward model draws nothing; name its folder in reward_funcs of another run"
        )
    if method not in ("ancestral", "best_of", "rejection"):
        raise ValueError(f"sample: got method {method!r}, expected ancestral, best_of or rejection")
    if method == "rejection" and (bound is None or config.beta is None):
        raise ValueError(
            "sample: rejection needs an upper bound of the reward (--bound) and a beta (--beta, or a planned run)"
        )
    if method == "rejection" and config.target.kind != "tilt":
        raise ValueError(
            f"sample: rejection draws from the plain tilt, got target.kind {config.target.kind}; use --target.kind tilt, "
            "or train"
        )


def _merge(parts: store.StoredParts) -> None:
    parts.merge()
    store.remove_parts(parts.path)


def _leave_nothing(path: Path) -> None:
    """Remove the folder of parts, and those about it that hold nothing else."""
    store.remove_parts(path)
    for folder in (path.parent, path.parent.parent):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _record(path: Path, pool: Pool) -> dict[str, Any]:
    """What is in the file."""
    draws = pool.draws
    assert draws.texts is not None
    return {
        "path": str(path),
        "draws": pool.reward.numel(),
        "reward": mean_estimate(pool.reward, generator=generator_for(0, "sample")).as_dict(),
        "samples": [
            {
                "prompt": example.prompt
                if isinstance(example.prompt, str)
                else example.prompt[-1]["content"],
                "completion": text,
                "reward": pool.reward[p, g].item(),
                "log_ref": pool.log_ref[p, g].item(),
            }
            for p, example in enumerate(draws.examples)
            for g, text in enumerate(draws.texts[p])
        ],
    }
