"""A run from a configuration: what it names is loaded, the verbs are called, and what they yield is written down.

This is the edge: it reads and writes files through `klimb.store` and prints nothing; whoever watches passes `Watch`.

Every verb draws from a generator of its own, seeded by (seed, what it is for), so no verb disturbs another, and a run
that was killed and resumed sees the numbers that one never killed sees.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from klimb import store
from klimb.beginning import begin, hold, say_what_differs
from klimb.config import Config
from klimb.judging import kept_pool
from klimb.loaded import Loaded, prepare
from klimb.measuring import measured
from klimb.numbers.tilt import draws_needed
from klimb.planning import planned, replanned
from klimb.ranks import ALONE, Ranks
from klimb.reward_run import learned_reward, measured_reward
from klimb.rewards.unscored import Unscored
from klimb.samplers.vllm import GOES_ON
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
        return measured(loaded, config.beta, None, watch)
    path = Path(output_dir)
    with ExitStack() as until_done:
        ranks.from_first(partial(hold, path, until_done, watch))
        watch = until_done.enter_context(_tracked(watch, config, path, ranks))
        return measured(loaded, config.beta, path, watch, policy_folder=Path(policy_folder))


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
        keep_out = partial(hold, path, until_done, watch)
        return _learned_reward(config, verbs, resume, watch, profile, keep_out)
    _check_budget(config)
    loaded = ranks.together(partial(prepare, config, ranks=ranks))
    if "train" in verbs and config.prompts_per_step > len(loaded.train_examples):
        raise ValueError(
            f"prompts_per_step {config.prompts_per_step} is more than the {len(loaded.train_examples)} prompts there "
            "are; use fewer a step"
        )
    ranks.from_first(partial(hold, path, until_done, watch))
    ranks.from_first(partial(begin, loaded, path, resume))
    if resume:
        ranks.from_first(partial(say_what_differs, path, watch))
    outcome = Outcome(path, config.beta)
    pool = None
    if "plan" in verbs:
        try:
            pool, beta, record = planned(loaded, path, watch, to_train="train" in verbs)
        except ValueError as error:
            # an error's class does not travel between ranks
            goes_on = isinstance(error, Unscored) or store.FULL in str(error) or GOES_ON in str(error)
            if not resume and ranks.first and not goes_on:
                store.undo_run(path)
            raise
        outcome = replace(outcome, beta=beta, plan=record)
    if "train" in verbs and loaded.judged:
        pool = kept_pool(loaded, path, watch)
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
            outcome = replace(outcome, measurement=measured(loaded, outcome.beta, path, told))
    return replace(outcome, report=report(path, watch=watch)) if ranks.first else outcome


def _check_budget(config: Config) -> None:
    if config.kl_budget is None or config.plan is not None:
        return
    needed = draws_needed(config.kl_budget)
    if config.num_plan_draws < needed:
        raise ValueError(
            f"kl_budget {config.kl_budget:g} nats needs about {needed} draws a prompt, num_plan_draws is "
            f"{config.num_plan_draws}; plan with more draws, or a smaller budget"
        )


def _learned_reward(
    config: Config,
    verbs: Sequence[str],
    resume: bool,
    watch: Watch,
    profile: bool,
    keep_out: Callable[[], None],
) -> Outcome:
    """A run whose product is a reward model."""
    path = Path(config.output_dir)
    done, found = learned_reward(config, verbs, resume=resume, watch=watch, profile=profile, hold=keep_out)
    halted = done.stopped and (done.state.step < config.max_steps or "measure" in verbs)
    outcome = Outcome(
        path, config.beta, None, found, done.state.step, profile=done.profile, interrupted=halted
    )
    return outcome if halted else replace(outcome, report=report(path, watch=watch))


@contextmanager
def begun(config: Config, *, resume: bool) -> Generator[Loaded]:
    """Within this context the run is there and held, and what its configuration names is loaded; for who draws it in another way."""
    path = Path(config.output_dir)
    with ExitStack() as until_done:
        if not resume:
            store.check_free(path)
        _check_budget(config)
        loaded = prepare(config)
        hold(path, until_done, UNWATCHED)
        begin(loaded, path, resume)
        yield loaded


def report(path: Path, *, watch: Watch = UNWATCHED) -> Path | None:
    """Write RUN/report.html; without the packages that draw it, say so and return None: the run itself is done."""
    from klimb.report import write_report

    missing = [name for name in ("altair", "vl_convert") if importlib.util.find_spec(name) is None]
    if missing:
        watch.event("warning", f"no report: {' and '.join(missing)} missing; pip install 'klimb[report]'")
        return None
    return write_report(path)
