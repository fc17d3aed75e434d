"""What a person gives to derive, target and divergence: numbers in words, a small YAML file, or a run's draws.

A YAML file holds `beta` and either one prompt (`ref`, `reward`, and `policy` if wanted) or a list `prompts` of such. In place
of `reward` it may hold `target`: then r = beta log(target/ref), and Z = 1.

Of a run the distinct completions that `measure` drew are taken, with their log-probability under policy and reference,
renormalised over them: a finite space, where everything is exact. It is not the whole one, so what measure.json
estimates for the whole one stands beside it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from klimb.aim import aimed_at, recorded_aim
from klimb.data import Pool
from klimb.exact import check
from klimb.exact.derivation import values_at
from klimb.exact.problem import Problem, check_beta, check_policy, law, pad, padded, problem
from klimb.nearest import nearest_run
from klimb.store import StoredDraws, draws_path, read_draws, read_json
from klimb.target import own_reward

KEYS = ("ref", "reward", "target", "policy")


@dataclass(frozen=True, eq=False)
class Given:
    """A problem, and where it comes from.

    Attributes:
        problem: the numbers.
        log_pi: [P, Y] a policy, nats; None: none was given.
        source: in words.
        run: what is known of a run beside the restriction to its draws; None for numbers of one's own.
    """

    problem: Problem
    log_pi: Tensor | None
    source: str
    run: Mapping[str, Any] | None = None


def numbers(text: str, *, name: str) -> list[float]:
    """Numbers in words, separated by commas; a fraction is one too.

    Raises:
        ValueError: one of them is none.

    Example:
        >>> numbers("0.5, 1/4, 1e-1, -inf", name="reward")
        [0.5, 0.25, 0.1, -inf]
    """
    return [_number(word, name, place) for place, word in enumerate(text.split(","), 1)]


def number(text: str, *, name: str) -> float:
    """One number in words.

    Raises:
        ValueError: it is none.

    Example:
        >>> number("1/2", name="beta")
        0.5
    """
    return _number(text, name)


def built_in(*, beta: float | None = None) -> Given:
    """The example that needs nothing: two prompts, three outcomes.

    Raises:
        ValueError: beta is not above zero.
    """
    given = check.example()
    if beta is not None:
        check_beta(beta)
        given = Problem(given.log_ref, given.reward, beta)
    return Given(given, None, "the built-in example")


def from_words(ref: str, reward: str, beta: float, *, policy: str | None = None) -> Given:
    """One prompt from the command line.

    Raises:
        ValueError: as `klimb.exact.problem.problem`, or a word is no number.
    """
    given = problem([numbers(ref, name="ref")], [numbers(reward, name="reward")], beta)
    own = None if policy is None else numbers(policy, name="policy")
    return Given(given, _policy([own], given), "the command line")


def from_yaml(path: Path, *, beta: float | None = None) -> Given:
    """The prompts of a YAML file.

    Args:
        path: the file.
        beta: reward per nat, in place of the file's.

    Raises:
        ValueError: no such file, an unknown key, a number that is none, and as `klimb.exact.problem.problem`.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected YAML with beta, ref and reward")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{path}: got {type(found).__name__}, expected beta, ref and reward, or beta and prompts"
        )
    several = found.get("prompts")
    _known(found, ("beta", "prompts") if "prompts" in found else ("beta", *KEYS), str(path))
    if beta is None:
        if found.get("beta") is None:
            raise ValueError(
                f"{path}: holds no beta; expected one, in units of reward per nat, here or as --beta"
            )
        beta = _number(found["beta"], f"{path}: beta")
    if "prompts" in found and not (isinstance(several, list) and several):
        raise ValueError(f"{path}: prompts: expected a list with a ref and a reward each")
    check_beta(beta, name=f"{path}: beta")
    rows = several if several else [found]
    read = [
        _row(row, beta, f"{path}: prompt {x}: " if several else f"{path}: ") for x, row in enumerate(rows, 1)
    ]
    given = problem([ref for ref, _, _ in read], [r for _, r, _ in read], beta, name=f"{path}: ")
    return Given(given, _policy([pi for _, _, pi in read], given), str(path))


def from_run(run: Path, *, beta: float | None = None) -> Given:
    """The distinct completions that a run drew: those of measure, or the plan's pool, where there is no policy yet.

    Args:
        run: its directory.
        beta: reward per nat, in place of the run's.

    Raises:
        ValueError: it holds no draws, or no beta, or a draw without a reward or log-probability.
    """
    if not run.is_dir():
        raise ValueError(f"{run}: no such directory{nearest_run(run)}; expected that of a run")
    measured, planned = run / "measure.json", run / "plan.json"
    record: dict[str, Any] = {}
    plan: dict[str, Any] = {}
    if measured.is_file() and draws_path(run, "measure").is_file():
        record = read_json(measured)
        names = [name for name in ("measure", "measure-reference") if draws_path(run, name).is_file()]
        chosen = record.get("beta")
    elif planned.is_file() and draws_path(run, "plan").is_file():
        plan = read_json(planned)
        names, chosen = ["plan"], plan["beta"]["value"]
    else:
        raise ValueError(f"{run}: holds neither measured nor planned draws; run klimb measure {run} first")
    stored = [_of_the_target(read_draws(draws_path(run, name)), record or plan) for name in names]
    beta = chosen if beta is None else beta
    check_beta(beta)
    same = beta == chosen  # what was measured was measured at the run's own beta
    rows = _distinct(stored, run, with_policy=bool(record))
    kept = [row for row in rows if bool((row[1] > -math.inf).any())]
    if not kept:
        raise ValueError(f"{run}: every draw is forbidden (reward -inf): there is no target")
    # forbidden completions have no mass under p: what is compared lives on the others
    allowed = [tuple(values[row[1] > -math.inf] for values in row) for row in kept]
    log_ref, reward = [a[0].log_softmax(0) for a in allowed], [a[1] for a in allowed]
    log_pi = pad([a[2].log_softmax(0) for a in allowed], -math.inf) if record else None
    mass = {"reference": _mass([a[0] for a in allowed])}
    if record:
        mass["policy"] = _mass([a[2] for a in allowed])
    about = {
        "path": str(run),
        "draws": [f"{name}.parquet" for name in names],
        "prompts": len(kept),
        "completions": sum(len(r) for r in reward),
        "forbidden": sum(len(row[1]) for row in rows) - sum(len(r) for r in reward),
        "mass": mass,
        "weighted": _weighted(allowed, beta) if record else None,
        "estimates": _estimates(record, beta) if record and same else None,
    }
    return Given(padded(log_ref, reward, beta), log_pi, f"the draws of {run}", about)


def _of_the_target(stored: StoredDraws, record: Mapping[str, Any]) -> StoredDraws:
    """The draws with the own reward of the target that a record tells of, whose plain tilt it is."""
    log_ref = stored.draws.log_q if stored.log_ref is None else stored.log_ref
    if stored.reward is None or log_ref is None:
        return stored
    unasked: Any = None  # neither policy nor reward is looked at
    target = aimed_at(recorded_aim(record.get("target")), unasked, unasked, 1.0)
    return replace(stored, reward=own_reward(target, Pool(stored.draws, stored.reward, log_ref)))


def _distinct(stored: Sequence[StoredDraws], run: Path, *, with_policy: bool) -> list[tuple[Tensor, ...]]:
    """Of each prompt log ref, reward, log pi and count [Y_x] of the completions drawn; pi = ref without a policy."""
    prompts: dict[str, dict[tuple[int, ...], list[tuple[float, float, float]]]] = {}
    for pool in stored:
        # the plan's pool is the reference's own: what it was drawn from is log ref
        log_ref = pool.draws.log_q if pool.log_ref is None and pool.verb == "plan" else pool.log_ref
        log_pi = pool.log_pi if with_policy else log_ref
        if log_ref is None or log_pi is None or pool.reward is None:
            raise ValueError(
                f"{run}: draws of {pool.verb} without reward or log-probability; run klimb measure {run}"
            )
        columns = torch.stack([log_ref.double(), pool.reward.double(), log_pi.double()], -1)
        if bool(columns.isnan().any()):
            raise ValueError(f"{run}: draws of {pool.verb} hold NaN; run klimb measure {run} again")
        for example, group, values in zip(
            pool.draws.examples, pool.draws.completions, columns.tolist(), strict=True
        ):
            seen = prompts.setdefault(example.id, {})
            for ids, row in zip(group, values, strict=True):
                seen.setdefault(tuple(ids.tolist()), []).append(row)
    rows = []
    for seen in prompts.values():
        # a completion drawn several times has several rewards only if the reward is noisy: their mean
        first = [(s[0][0], math.fsum(row[1] for row in s) / len(s), s[0][2], len(s)) for s in seen.values()]
        rows.append(torch.tensor(first, dtype=torch.float64).unbind(1))
    return rows


def _mass(log_laws: Sequence[Tensor]) -> float:
    """What share of a law the completions hold, a mean over prompts."""
    return math.fsum(values.logsumexp(0).exp().item() for values in log_laws) / len(log_laws)


def _weighted(rows: Sequence[tuple[Tensor, ...]], beta: float) -> dict[str, float]:
    """The same quantities with each completion weighted by law / mixture of the laws that drew: for the whole space.

    A finite space too, so the identity is exact in it; its values are self-normalised importance sampling's.
    """
    # draws of policy and reference are as many, so each completion was drawn from the middle of the two laws
    scale = [counts.log() - torch.logaddexp(log_ref, log_pi) for log_ref, _, log_pi, counts in rows]
    refs = [(row[0] + s).log_softmax(0) for row, s in zip(rows, scale, strict=True)]
    laws = [(row[2] + s).log_softmax(0) for row, s in zip(rows, scale, strict=True)]
    return values_at(padded(refs, [row[1] for row in rows], beta), pad(laws, -math.inf))


def _estimates(record: Mapping[str, Any], beta: float) -> dict[str, Any]:
    """What measure.json says of the whole space, by the names that `restricted` uses."""
    left = record["gap"]
    in_nats = {
        **left,
        **{k: left[k] if left[k] is None else left[k] / beta for k in ("value", "low", "high")},
    }
    return {
        "reward": record["reward"],
        "kl_ref": record["kl"],
        "objective": record["objective"],
        "log_z": record["log_z"],
        "kl_p": in_nats,
        "gap": left,
    }


def _row(row: object, beta: float, where: str) -> tuple[list[float], list[float], list[float] | None]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}got {type(row).__name__}, expected ref and reward")
    _known(
        row, ("beta", *KEYS) if "beta" in row and "prompt " not in where else KEYS, where.removesuffix(": ")
    )
    read = {k: _list(row[k], f"{where}{k}") for k in KEYS if row.get(k) is not None}
    if "ref" not in read or ("reward" in read) == ("target" in read):
        raise ValueError(
            f"{where}got {', '.join(read) or 'nothing'}; expected ref, and one of reward and target"
        )
    reward = read["reward"] if "reward" in read else implied_reward(read["ref"], read["target"], beta, where)
    return read["ref"], reward, read.get("policy")


def implied_reward(
    ref: Sequence[float], target: Sequence[float], beta: float, where: str = ""
) -> list[float]:
    """The reward whose target is a given law: beta log(target/ref), Z = 1; -inf where the target has no mass.

    Raises:
        ValueError: no law, other lengths, or the target has mass where the reference has none.

    Example:
        >>> [round(r, 4) for r in implied_reward([0.5, 0.5], [0.8, 0.2], 1.0)]
        [0.47, -0.9163]
    """
    log_ref, log_target = law(ref, name=f"{where}ref"), law(target, name=f"{where}target")
    if len(log_ref) != len(log_target):
        raise ValueError(
            f"{where}got {len(ref)} probabilities in ref and {len(target)} in target, expected as many"
        )
    for place, (a, b) in enumerate(zip(ref, target, strict=True), 1):
        if a == 0 and b > 0:
            raise ValueError(
                f"{where}target: got {b:g} at place {place}, where ref has 0: no reward makes the reference go there; "
                "give ref some mass there, or the target none"
            )
    reward = beta * (log_target - log_ref)
    return torch.where(log_target == -math.inf, -math.inf, reward).tolist()


def _policy(rows: Sequence[Sequence[float] | None], given: Problem) -> Tensor | None:
    if all(row is None for row in rows):
        return None
    laws = []
    for x, row in enumerate(rows, 1):
        if row is None:
            raise ValueError(f"policy: prompt {x} has none, expected one for every prompt or for none")
        expected = int((given.log_ref[x - 1] > -math.inf).nonzero().max()) + 1
        if len(row) > given.log_ref.shape[1] or len(row) < expected:
            raise ValueError(f"policy: got {len(row)} probabilities, expected one for each outcome of ref")
        laws.append(law(row, name="policy"))
    log_pi = pad([*laws, torch.zeros(given.log_ref.shape[1])], -math.inf)[:-1]
    check_policy(log_pi, given)
    return log_pi


def _list(value: object, name: str) -> list[float]:
    if isinstance(value, str):
        return numbers(value, name=name)
    if not isinstance(value, list):
        raise ValueError(f"{name}: got {value!r}, expected a list of numbers")
    return [_number(word, name, place) for place, word in enumerate(value, 1)]


def _number(word: object, name: str, place: int | None = None) -> float:
    text = str(word).replace(" ", "")
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError) as error:
        at = "" if place is None else f" at place {place}"
        raise ValueError(f"{name}: got {str(word)!r}{at}, expected a number such as 0.25 or 1/4") from error


def _known(found: Mapping[str, object], known: Sequence[str], where: str) -> None:
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {near[0]}?" if near else f"; expected {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key}{hint}")
