"""What the runs of climb_vs_trl.py came to: which are recorded, which learning rate is a method's best, the tables.

Nothing here trains or loads a model. A record is one run, a JSON file: what it is (`WHAT`), versions, and `checkpoints`,
each with step, tokens (drawn so far), seconds (of training so far) and the certificate's reward, kl, gap and attained.
Tokens and seconds of a plan are counted; the first checkpoint is the untrained policy.
"""

import json
import math
import re
import statistics
from itertools import pairwise

WHAT = ("method", "options", "rate", "seed", "machine", "settings")
"""what tells one run from another; a run that took more steps stands for all shorter ones"""
HALF = 0.5


def file_name(run):
    """Where a run is recorded: a folder a machine.

    >>> machine = {"device": "cuda", "name": "NVIDIA H200", "threads": 4, "jobs": 1}
    >>> file_name({"method": "trl_rloo", "rate": 3e-4, "seed": 1, "machine": machine})
    'nvidia-h200-4-threads-1-jobs/trl_rloo-0.0003-seed1.json'
    """
    name, threads, jobs = (run["machine"][x] for x in ("name", "threads", "jobs"))
    folder = f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{threads}-threads-{jobs}-jobs"
    return f"{folder}/{run['method']}-{run['rate']:g}-seed{run['seed']}.json"


def read(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]


def is_recorded(run, records):
    """True if the same run is among the records, with as many steps or more."""
    return any(
        all(record[name] == run[name] for name in WHAT) and record["steps"] >= run["steps"]
        for record in records
    )


def missing(runs, records):
    return [run for run in runs if not is_recorded(run, records)]


# One run: its curve through the checkpoints, straight between them.


def value_at(checkpoints, axis, amount, name):
    """A certified number after so many tokens or seconds: the untrained policy's before the first, NaN after the last."""
    known = [(point[axis], point[name]["value"]) for point in checkpoints]
    if amount <= known[0][0]:
        return known[0][1]
    for (x0, y0), (x1, y1) in pairwise(known):
        if amount <= x1:
            return y0 + (y1 - y0) * (amount - x0) / (x1 - x0)
    return math.nan


def until_closed(checkpoints, axis, share=HALF):
    """Tokens or seconds until this share of the untrained policy's gap is closed; infinite where it never is."""
    goal = (1 - share) * checkpoints[0]["gap"]["value"]
    for before, after in pairwise(checkpoints):
        g0, g1 = before["gap"]["value"], after["gap"]["value"]
        if g1 <= goal:
            return before[axis] + (after[axis] - before[axis]) * (g0 - goal) / (g0 - g1)
    return math.inf


def last_gap(record):
    """The gap where the run ended; infinite where it came apart."""
    return math.inf if record["ended"] else record["checkpoints"][-1]["gap"]["value"]


def seconds_to_half(record):
    return until_closed(record["checkpoints"], "seconds")


# One method: its learning rates, compared on the first seed.


def best_rate(records, method, seed, key):
    """The learning rate with the smallest `key`, ties (never there) by the gap where the run ended; None without runs."""
    tried = [r for r in records if r["method"] == method and r["seed"] == seed]
    return min(tried, key=lambda r: (key(r), last_gap(r)))["rate"] if tried else None


def best_rates(records, method, seed):
    """The rates that the two tables show, without repetition."""
    found = (best_rate(records, method, seed, key) for key in (last_gap, seconds_to_half))
    return list(dict.fromkeys(rate for rate in found if rate is not None))


def of_best(records, methods, seed, key):
    """method -> its runs, all seeds, at its best rate; in the order of `methods`, without those that have no runs."""
    rates = {method: best_rate(records, method, seed, key) for method in methods}
    return {
        method: [r for r in records if r["method"] == method and r["rate"] == rate]
        for method, rate in rates.items()
        if rate is not None
    }


# Markdown.


def tables(records, methods, seed):
    """Both tables, for each machine and settings by themselves.

    Args:
        records: runs.
        methods: name -> what it is called in the table; those with "trl" in the name are the peers.
        seed: on which the learning rate was chosen.
    """
    parts = []
    for settings, machine in _distinct((r["settings"], r["machine"]) for r in records):
        here = [r for r in records if r["settings"] == settings and r["machine"] == machine]
        parts += [
            _heading(here[0]),
            equal_budgets(of_best(here, methods, seed, last_gap), methods),
            time_to_close(of_best(here, methods, seed, seconds_to_half), methods),
        ]
    return "\n\n".join(parts)


def equal_budgets(runs, methods):
    """KL, gap and share of every method after as many tokens, and after as many seconds, as all of them have."""
    whole = [r for rs in runs.values() for r in rs if not r["ended"]]
    ends = {
        axis: min((r["checkpoints"][-1][axis] for r in whole), default=0) for axis in ("tokens", "seconds")
    }
    heads = " | ".join(
        f"{name} at {ends[axis]:.0f} {axis}" for axis in ends for name in ("KL", "gap", "share")
    )
    lines = [f"| | {heads} | rate |", "|---" * 8 + "|"]
    for method, rs in runs.items():
        cells = [
            spread([value_at(r["checkpoints"], axis, end, name) for r in rs])
            for axis, end in ends.items()
            for name in ("kl", "gap", "attained")
        ]
        lines.append(f"| {methods[method]} | {' | '.join(cells)} | {rs[0]['rate']:g} |")
    return "\n".join(lines)


def time_to_close(runs, methods):
    """Seconds until a third and half of the gap are closed, and how many times as long as klimb's best a peer takes."""
    names = {1 / 3: "a third", HALF: "half"}
    heads = " | ".join(f"seconds to {name} of the gap | times klimb's best" for name in names.values())
    lines = [f"| | {heads} | tokens to half | seconds a step | rate |", "|---" * 8 + "|"]
    seconds = {
        share: {m: [until_closed(r["checkpoints"], "seconds", share) for r in rs] for m, rs in runs.items()}
        for share in names
    }
    for method, rs in runs.items():
        longest = max(r["checkpoints"][-1]["seconds"] for r in rs)
        cells = [
            f"{spread(found[method], 0, within=longest)} | {_ratio(found, method, longest)}"
            for found in seconds.values()
        ]
        tokens = [until_closed(r["checkpoints"], "tokens") for r in rs]
        each = spread([_seconds_a_step(r) for r in rs], 2)
        lines.append(
            f"| {methods[method]} | {' | '.join(cells)} | {spread(tokens, 0)} | {each} | {rs[0]['rate']:g} |"
        )
    return "\n".join(lines)


def _ratio(seconds, method, longest):
    """How many times as long as klimb's best, at least so many where it never came there; nothing where klimb never did."""
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ours = min((x for name, x in middle.items() if "trl" not in name), default=math.inf)
    if math.isinf(ours):
        return ""
    there = math.isfinite(middle[method])
    return f"{'' if there else '> '}{(middle[method] if there else longest) / ours:.2g}"


def spread(values, digits=3, *, within=None):
    """The median, and [smallest, largest] of several; NaN is a run that came apart before, infinite what never was.

    >>> spread([0.25]), spread([3.0, math.nan, 1.0, 2.0], 0), spread([math.inf], 0, within=900)
    ('0.250', '2 [1, 3], 1 ended', 'not in 900')
    """
    there = [x for x in values if not math.isnan(x)]
    ended = [f"{len(values) - len(there)} ended"] if len(there) < len(values) else []

    def word(x):
        never = "never" if within is None else f"not in {within:.0f}"
        return never if math.isinf(x) else f"{x:.{digits}f}"

    middle = [word(statistics.median(there))] if there else []
    if len(there) > 1:
        middle[0] += f" [{word(min(there))}, {word(max(there))}]"
    return ", ".join(middle + ended)


def _seconds_a_step(record):
    first, last = record["checkpoints"][0], record["checkpoints"][-1]
    return (last["seconds"] - first["seconds"]) / max(last["step"] - first["step"], 1)


def _heading(record):
    machine, settings = record["machine"], record["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"{machine['name']}, {machine['threads']} threads, {machine['jobs']} runs at a time, {settings['dtype']}; {versions}. "
        f"beta {settings['beta']:g}, {settings['prompts']} prompts x {settings['generations']} generations x "
        f"{settings['tokens']} tokens a step; certified on {settings['held_out']} prompts x "
        f"{settings['held_out_draws']} draws in {settings['certified_in']}."
    )


def _distinct(values):
    found = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
