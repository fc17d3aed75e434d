"""A measurement on disk: the held-out draws, kept as they come, and the record that measure.json holds.

Which record depends on what says what is good: a reward gives the certificate, a teacher the distance to it, comparisons
alone how the policy orders them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from klimb import store
from klimb.aim import aimed_at, target_record
from klimb.diagnosis import diagnosed
from klimb.distil import distance
from klimb.loaded import Loaded, depends, generator_for
from klimb.measure import away, measure
from klimb.models.hub import weights_of
from klimb.models.policy import CausalPolicy
from klimb.offline import judged_pool, orders
from klimb.records import diagnosis_record, distance_record, measure_record, unrewarded_record
from klimb.target import tilt
from klimb.watch import Watch


def measured(
    loaded: Loaded, beta: float, path: Path | None, watch: Watch, policy_folder: Path | None = None
) -> dict[str, Any]:
    """What measure.json holds of the policy, which lies in `policy_folder`, or RUN/policy."""
    config = loaded.config
    parts: dict[str, store.StoredParts] = {}
    if path is not None and loaded.teacher is None:
        parts = loaded.ranks.from_first(
            partial(_held_out_parts, loaded, path, policy_folder or path / "policy")
        )
    if config.touched("measure_prompts") and config.measure_prompts > len(loaded.test_examples):
        watch.event(
            "warning",
            f"measure_prompts {config.measure_prompts}: there are {len(loaded.test_examples)}, and all of them are measured on",
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
