"""Draws from a configuration, without a training: completions of the held-out prompts, and the file of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from klimb import store
from klimb.config import Config
from klimb.data import Pool, stack_pools
from klimb.loaded import generator_for, prepare
from klimb.numbers.estimate import mean_estimate
from klimb.sample import sample
from klimb.samplers.best_of import best_of
from klimb.samplers.rejection import rejection
from klimb.target import tilt
from klimb.watch import UNWATCHED, Watch


@dataclass(frozen=True)
class Samples:
    """Draws to be made, a few prompts at a time, and what a file of them has to say.

    Attributes:
        pools: made while one goes through them.
        verb: "sample" for draws of the reference itself, which a plan can rest on; else sample- and the law.
        hashes: of what their rewards and log_ref depend on.
    """

    pools: Iterator[Pool]
    verb: str
    hashes: Mapping[str, str]

    def __iter__(self) -> Iterator[Pool]:
        return self.pools


def run_sample(
    config: Config,
    *,
    method: str = "ancestral",
    num_draws: int = 1,
    n: int = 4,
    bound: float | None = None,
    limit: int | None = None,
    policy_folder: str | Path | None = None,
    watch: Watch = UNWATCHED,
) -> Samples:
    """Draw completions of the held-out prompts, without training anything.

    Args:
        config: names model, reward, prompts and, for rejection, beta.
        method: "ancestral" from the policy in `policy_folder` (without one, from the starting policy); "best_of" and
            "rejection" from the reference.
        num_draws: completions a prompt.
        n: candidates of best_of.
        bound: an upper bound of the reward, for rejection.
        limit: at most this many prompts.
        policy_folder: what `from_pretrained` loads.
        watch: who looks on.

    Raises:
        ValueError: an unknown method, or rejection without bound or beta.
    """
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
    loaded = prepare(config, policy_folder=policy_folder)
    target = tilt(loaded.reference, loaded.reward, config.beta or 1.0)  # only rejection looks at beta
    samplers: dict[str, Any] = {
        "ancestral": loaded.sampler,
        "best_of": partial(best_of, sampler=loaded.sampler, reward=loaded.reward, n=n),
        "rejection": partial(
            rejection, sampler=loaded.sampler, target=target, bound=math.inf if bound is None else bound
        ),
    }
    # a policy that nobody has moved is the reference, unless that is another model
    untrained = policy_folder is None and config.reference is None
    law = method if method != "ancestral" else "" if untrained else "policy"
    pools = sample(
        loaded.test_examples[:limit],
        loaded.policy if method == "ancestral" else loaded.reference,
        samplers[method],
        num_draws=num_draws,
        generator=generator_for(config.seed, "sample"),
        target=target,
        progress=watch.progress,
    )
    return Samples(pools, f"sample-{law}" if law else "sample", loaded.hashes)


def write_samples(output_dir: Path, samples: Samples) -> dict[str, Any]:
    """Write draws/sample.parquet (an older one is replaced) and say what is in it.

    Raises:
        ValueError: as `run_sample`, whose draws are made here.
    """
    pool = stack_pools(list(samples))
    path = store.draws_path(output_dir, "sample")
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_pool(path, pool, verb=samples.verb, hashes=samples.hashes)
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
