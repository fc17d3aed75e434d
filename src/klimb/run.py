"""A run from a configuration: what it names is loaded, the verbs are called, and what they yield is written down.

This is the edge: it reads and writes files through `klimb.store` and prints nothing; whoever watches passes `Watch`.

Every verb draws from a generator of its own, seeded by (seed, what it is for), so no verb disturbs another, and a run
that was killed and resumed sees the numbers that one never killed sees.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from klimb import store
from klimb.aim import aimed_at, target_record
from klimb.config import DESTINATIONS, Config, load
from klimb.data import Pool, stack_pools
from klimb.diagnosis import diagnosed
from klimb.distil import distance
from klimb.loaded import Loaded, depends, generator_for, prepare, reward_hashes
from klimb.measure import away, measure
from klimb.models.hub import weights_of
from klimb.models.policy import CausalPolicy
from klimb.numbers.estimate import mean_estimate
from klimb.numbers.tilt import draws_needed
from klimb.offline import judged_pool, orders
from klimb.planning import planned, replanned
from klimb.ranks import ALONE, Ranks
from klimb.records import diagnosis_record, distance_record, measure_record, unrewarded_record
from klimb.reward_run import learned_reward, measured_reward
from klimb.rewards.unscored import Unscored
from klimb.sample import sample
from klimb.samplers.best_of import best_of
from klimb.samplers.rejection import rejection
from klimb.target import tilt
from klimb.trackers import tracked
from klimb.training import trained
from klimb.watch import UNWATCHED, Watch

VERBS = ("plan", "train", "measure")


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        path: its directory.
        beta: reward per nat.
        plan: what plan.json holds, or None.
        measurement: what measure.json holds, or None.
        step: optimizer steps done.
        report: report.html, if there is one.
        profile: what profile.json holds, or None.
        interrupted: it was asked to stop before its end.
    """

    path: Path
    beta: float | None
    plan: Mapping[str, Any] | None = None
    measurement: Mapping[str, Any] | None = None
    step: int = 0
    report: Path | None = None
    profile: Mapping[str, Any] | None = None
    interrupted: bool = False


# The verbs on disk.


def run_plan(
    config: Config, *, resume: bool = False, watch: Watch = UNWATCHED, ranks: Ranks = ALONE
) -> Outcome:
    """Plan: predict the best policy for every beta. Arguments and errors as `climb`."""
    if config.learn_from == "data":
        raise ValueError(
            "plan: learn_from data draws nothing; plan with learn_from draws and a reward, or go on to train"
        )
    return _run(config, ("plan",), resume, watch, ranks=ranks)


def run_train(
    config: Config,
    *,
    resume: bool = False,
    watch: Watch = UNWATCHED,
    profile: bool = False,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Plan if that is needed, and train. Arguments and errors as `climb`."""
    verbs = ("plan", "train") if config.needs_plan else ("train",)
    return _run(config, verbs, resume, watch, profile, ranks)


def climb(
    config: Config,
    *,
    resume: bool = False,
    watch: Watch = UNWATCHED,
    profile: bool = False,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Plan, train, measure and report; the model is loaded once.

    Args:
        config: the configuration; `output_dir` is where everything is written.
        resume: go on with the run that is there.
        watch: who looks on.
        profile: look at one or two steps of the training with torch's profiler: profile.json and trace.json.gz say
            where time and memory went. The numbers of the run are the same.
        ranks: who shares the work; every one of them has to call this, and the first one writes.

    Raises:
        ValueError: for whatever cannot be done, before anything is written; what was begun because of it is removed.
    """
    verbs = VERBS[1:] if config.learn_from == "data" or config.method == "distill" else VERBS
    return _run(config, verbs, resume, watch, profile, ranks)


def run_measure(
    config: Config,
    *,
    policy_folder: str | Path,
    output_dir: str | Path | None = None,
    watch: Watch = UNWATCHED,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Certify the policy in a folder (a peft adapter or a whole model) against the target of `config`.

    Args:
        config: names reference, reward, prompts and beta.
        policy_folder: what `from_pretrained` loads.
        output_dir: where measure.json and the draws go; None writes nothing.
        watch: who looks on.
        ranks: who shares the work; every one of them has to call this, and the first one writes.

    Returns:
        What measure.json holds.

    Raises:
        ValueError: no such policy, or no beta (a kl_budget is solved by a plan first).
    """
    if config.method == "reward_model":
        _check_alone(ranks)
        return measured_reward(config, Path(policy_folder), output_dir, watch=watch)
    if config.beta is None:
        raise ValueError(
            "measure: the beta of a kl_budget or reward_goal is found by a plan; give the directory of a run that "
            "was planned, or a beta"
        )
    loaded = ranks.together(partial(prepare, config, policy_folder=policy_folder, ranks=ranks))
    watch = watch if ranks.first else UNWATCHED
    if output_dir is None:
        return _measured(loaded, config.beta, None, watch)
    path = Path(output_dir)
    with ExitStack() as until_done:
        ranks.from_first(partial(_hold, path, until_done, watch))
        watch = until_done.enter_context(_tracked(watch, config, path, ranks))
        return _measured(loaded, config.beta, path, watch, policy_folder=Path(policy_folder))


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


def _check_alone(ranks: Ranks) -> None:
    if ranks.world > 1:
        raise ValueError(
            f"method reward_model: got {ranks.world} processes; it learns in one, leave out --nproc"
        )


def _tracked(watch: Watch, config: Config, path: Path, ranks: Ranks) -> AbstractContextManager[Watch]:
    """`tracked` where somebody looks on: at the first rank."""
    return tracked(watch, config, path) if ranks.first else nullcontext(UNWATCHED)


def _run(
    config: Config,
    verbs: Sequence[str],
    resume: bool,
    watch: Watch,
    profile: bool = False,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Load what is needed and call the verbs, with the directory of the run held."""
    with ExitStack() as until_done:
        return _held_run(config, verbs, resume, watch, profile, ranks, until_done)


def _held_run(
    config: Config,
    verbs: Sequence[str],
    resume: bool,
    watch: Watch,
    profile: bool,
    ranks: Ranks,
    until_done: ExitStack,
) -> Outcome:
    path = Path(config.output_dir)
    watch = watch if ranks.first else UNWATCHED
    if not resume:
        ranks.from_first(partial(store.check_free, path))
    if config.method == "reward_model":
        _check_alone(ranks)
        hold = partial(_hold, path, until_done, watch)
        done, found = learned_reward(config, verbs, resume=resume, watch=watch, profile=profile, hold=hold)
        halted = done.stopped and (done.state.step < config.max_steps or "measure" in verbs)
        outcome = Outcome(
            path, config.beta, None, found, done.state.step, profile=done.profile, interrupted=halted
        )
        return outcome if halted else replace(outcome, report=report(path, watch=watch))
    if (
        config.kl_budget is not None
        and config.plan is None
        and config.num_plan_draws < draws_needed(config.kl_budget)
    ):
        raise ValueError(
            f"kl_budget {config.kl_budget:g} nats needs about {draws_needed(config.kl_budget)} draws a prompt, "
            f"num_plan_draws is {config.num_plan_draws}; plan with more draws, or a smaller budget"
        )
    loaded = ranks.together(partial(prepare, config, ranks=ranks))
    if "train" in verbs and config.prompts_per_step > len(loaded.train_examples):
        raise ValueError(
            f"prompts_per_step {config.prompts_per_step} is more than the {len(loaded.train_examples)} prompts there "
            "are; use fewer a step"
        )
    ranks.from_first(partial(_hold, path, until_done, watch))
    ranks.from_first(partial(_began, loaded, path, resume))
    outcome = Outcome(path, config.beta)
    pool = None
    if "plan" in verbs:
        try:
            pool, beta, record = planned(loaded, path, watch, to_train="train" in verbs)
        except ValueError as error:
            # an error's class does not travel between ranks
            goes_on = isinstance(error, Unscored) or store.FULL in str(error)
            if not resume and ranks.first and not goes_on:
                store.undo_run(path)
            raise
        outcome = replace(outcome, beta=beta, plan=record)
    if "train" in verbs and loaded.judged:
        pool = _data(loaded, path, watch)
    with _tracked(watch, config, path, ranks) as told:
        if outcome.plan is not None:
            told.event("plan", outcome.plan)
        if "train" in verbs:
            assert outcome.beta is not None
            done = trained(
                loaded, path, pool=pool, beta=outcome.beta, resume=resume, watch=told, profile=profile
            )
            reached = done.state
            unfinished = reached.step < config.max_steps or "measure" in verbs
            outcome = replace(
                outcome, step=reached.step, profile=done.profile, interrupted=done.stopped and unfinished
            )
            if reached.beta is not None and reached.step == config.max_steps:
                outcome = replace(
                    outcome, beta=reached.beta, plan=replanned(loaded, path, pool, reached.beta)
                )
            if outcome.interrupted:
                return outcome
        if "measure" in verbs:
            assert outcome.beta is not None
            outcome = replace(outcome, measurement=_measured(loaded, outcome.beta, path, told))
    return replace(outcome, report=report(path, watch=watch)) if ranks.first else outcome


@contextmanager
def begun(config: Config, *, resume: bool) -> Generator[Loaded]:
    """Within this context the run is there and held, and what its configuration names is loaded; for who draws it in another way."""
    path = Path(config.output_dir)
    with ExitStack() as until_done:
        if not resume:
            store.check_free(path)
        loaded = prepare(config)
        _hold(path, until_done, UNWATCHED)
        _began(loaded, path, resume)
        yield loaded


def _hold(path: Path, until_done: ExitStack, watch: Watch) -> None:
    """Keep other runs out of the directory."""
    if not until_done.enter_context(store.held(path)):
        watch.event(
            "warning", f"{path}: this file system knows no locks; see to it that no other run writes there"
        )


def _began(loaded: Loaded, path: Path, resume: bool) -> None:
    """Make the directory of the run, or take up the one that is there."""
    config = loaded.config
    if resume:
        written = load(path / "config.yaml").model_dump()  # options that came later than the run by default
        # a directory may have been moved, and a plan that is done has put a beta in the place of a budget
        half = any(folder.stem == "plan" for folder, _ in store.unfinished(path))
        settled = {name: written[name] for name in ("output_dir", *(() if half else DESTINATIONS))}
        store.create_run(path, config={**config.model_dump(), **settled}, resume=True, written=written)
    else:
        # as asked until the plan has found beta
        store.create_run(
            path, config=config.model_dump(), seed=config.seed, reward_hashes=reward_hashes(loaded)
        )


def _data(loaded: Loaded, path: Path, watch: Watch) -> Pool:
    """The judged completions under the reference, from draws/data.parquet where a killed run left it."""
    where = store.draws_path(path, "data")

    def kept() -> Pool | None:
        if not where.is_file():
            return None
        found = store.read_draws(where, expect_hashes=loaded.hashes)
        assert found.reward is not None
        assert found.log_ref is not None
        return Pool(found.draws, found.reward, found.log_ref, token_log_ref=found.token_log_ref)

    if (there := loaded.ranks.from_first(kept)) is not None:
        return there
    length = loaded.config.max_completion_length
    pool = judged_pool(loaded.judged, loaded.reference, max_completion_length=length, progress=watch.progress)
    if cut := int((~pool.draws.finished).sum()):
        watch.event(
            "warning",
            f"{cut} of {pool.reward.numel()} completions were cut at max_completion_length {length}: what follows is not learned",
        )
    loaded.ranks.from_first(partial(_write_pool, where, pool, "data", loaded.hashes))
    return pool


def _write_pool(where: Path, pool: Pool, verb: str, hashes: Mapping[str, str]) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    store.write_pool(where, pool, verb=verb, hashes=hashes)


def report(path: Path, *, watch: Watch = UNWATCHED) -> Path | None:
    """Write RUN/report.html; without the packages that draw it, say so and return None: the run itself is done."""
    from klimb.report import write_report

    missing = [name for name in ("altair", "vl_convert") if importlib.util.find_spec(name) is None]
    if missing:
        watch.event("warning", f"no report: {' and '.join(missing)} missing; pip install 'klimb[report]'")
        return None
    return write_report(path)


def _measured(
    loaded: Loaded, beta: float, path: Path | None, watch: Watch, policy_folder: Path | None = None
) -> dict[str, Any]:
    """What measure.json holds of the policy, which lies in `policy_folder`, or RUN/policy."""
    config = loaded.config
    parts: dict[str, store.StoredParts] = {}
    if path is not None and loaded.teacher is None:
        parts = loaded.ranks.from_first(
            partial(_held_out_parts, loaded, path, policy_folder or path / "policy")
        )
    if config.dataset_test_split is None:
        watch.event("warning", "measured on the training prompts: dataset_test_split is null")
    try:
        if loaded.teacher is not None:
            record = _measured_distance(loaded, loaded.teacher, path, watch)
        elif not config.reward_funcs:
            record = _measured_without_reward(loaded, beta, path, watch, parts)
        else:
            record = _certified(loaded, beta, path, watch, parts)
    except ValueError:
        for some in parts.values():
            if loaded.ranks.first and not some.done():
                store.remove_parts(some.path)
        raise
    watch.event("measure", record)
    return record


def _held_out_parts(loaded: Loaded, path: Path, policy_folder: Path) -> dict[str, store.StoredParts]:
    """Where finished draws of policy and reference lie, by the verb of their file; those of a killed measurement among them.

    Raises:
        ValueError: those that are there are of another policy, reward, seed, ...
    """
    config = loaded.config
    examples = loaded.test_examples[: config.measure_prompts]
    rest = {"policy": store.hash_of(policy_folder), **depends(loaded, examples, config.measure_draws)}
    return {
        verb: store.begin_parts(store.draws_path(path, verb), verb=verb, hashes=loaded.hashes, depends=rest)
        for verb in ("measure", "measure-reference")
        if verb == "measure" or config.reward_funcs
    }


def _certified(
    loaded: Loaded, beta: float, path: Path | None, watch: Watch, parts: Mapping[str, store.StoredParts]
) -> dict[str, Any]:
    """What measure.json holds where a reward says what is good: the certificate."""
    config = loaded.config
    found = measure(
        loaded.test_examples[: config.measure_prompts],
        loaded.policy,
        aimed_at(config.target, loaded.reference, loaded.reward, beta),
        loaded.sampler,
        num_draws=config.measure_draws,
        generator=generator_for(config.seed, "measure"),
        progress=watch.progress,
        policy_parts=parts.get("measure"),
        reference_parts=parts.get("measure-reference"),
    )
    record = measure_record(
        found, target=target_record(config.target), weights=weights_of(loaded.reference.model)
    )
    if loaded.judged_test:
        record["comparisons"] = _orders(loaded, beta, watch)
    if path is None:
        return record
    return loaded.ranks.from_first(partial(_write_certified, path, record, parts))


def _write_certified(
    path: Path, record: dict[str, Any], parts: Mapping[str, store.StoredParts]
) -> dict[str, Any]:
    """Write the draws, and the record with what a diagnosis finds in the run's files."""
    for some in parts.values():
        some.merge()
    if (path / "config.yaml").is_file():  # with the plan and the steps beside the draws
        record["diagnosis"] = diagnosis_record(diagnosed(path, measured=record))
    store.write_json(path / "measure.json", record)
    for some in parts.values():  # last: killed before, nothing is drawn again
        store.remove_parts(some.path)
    return record


def _measured_without_reward(
    loaded: Loaded, beta: float, path: Path | None, watch: Watch, parts: Mapping[str, store.StoredParts]
) -> dict[str, Any]:
    """What measure.json holds where nobody named a reward: how far the policy went, and how it orders held-out completions."""
    config = loaded.config
    pool = away(
        loaded.test_examples[: config.measure_prompts],
        loaded.policy,
        tilt(loaded.reference, loaded.reward, beta),
        loaded.sampler,
        num_draws=config.measure_draws,
        generator=generator_for(config.seed, "measure"),
        progress=watch.progress,
        parts=parts.get("measure"),
    )
    record = unrewarded_record(pool, _orders(loaded, beta, watch), beta, target=target_record(config.target))
    if path is not None and loaded.ranks.first:
        parts["measure"].merge()
        store.write_json(path / "measure.json", record)
        store.remove_parts(parts["measure"].path)
    return record


def _orders(loaded: Loaded, beta: float, watch: Watch) -> dict[str, Any]:
    pool = judged_pool(
        loaded.judged_test,
        loaded.reference,
        max_completion_length=loaded.config.max_completion_length,
        progress=watch.progress,
        what="score held-out completions under the reference",
    )
    found = orders(pool, loaded.policy, beta, progress=watch.progress)
    return {name: estimate.as_dict() for name, estimate in found.items()}


def _measured_distance(
    loaded: Loaded, teacher: CausalPolicy, path: Path | None, watch: Watch
) -> dict[str, Any]:
    """What measure.json holds where the target is a policy: both KLs, before and after, and what a context cost."""
    config = loaded.config
    examples = loaded.test_examples[: config.measure_prompts]
    found = distance(
        examples,
        loaded.policy,
        loaded.reference,
        teacher,
        loaded.sampler,
        num_draws=config.measure_draws,
        generator=generator_for(config.seed, "measure"),
        progress=watch.progress,
    )
    virtual = loaded.policy.num_virtual
    lengths = {
        name: sum(len(who.render(example)) for example in examples) / len(examples)
        for name, who in (("teacher", teacher), ("policy", loaded.policy))
    }
    record = distance_record(
        found,
        target=target_record(config.target),
        prompt_tokens={**lengths, "policy": lengths["policy"] + virtual, "virtual": virtual},
    )
    if path is not None and loaded.ranks.first:
        store.write_json(path / "measure.json", record)
    return record
