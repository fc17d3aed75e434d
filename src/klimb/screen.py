"""What a person sees: bars with rates and time left on a terminal, plain lines elsewhere, a panel at the end."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from klimb.screen_diagnose import verdict_rows
from klimb.screen_profile import profile
from klimb.screen_reward import reward_model
from klimb.watch import Watch

EVERY = 5.0
"""seconds between plain lines of progress"""


@contextmanager
def watching(console: Console, *, quiet: bool) -> Generator[Watch]:
    """A `Watch` that shows what happens; Ctrl-C ends a training after its step, and anything else at once.

    A second Ctrl-C ends anything at once.
    """
    asked = threading.Event()
    training = threading.Event()

    def on_interrupt(*_: object) -> None:
        if asked.is_set() or not training.is_set():
            raise KeyboardInterrupt
        asked.set()
        console.print("stopping after this step; Ctrl-C again stops at once", style="yellow")

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, on_interrupt) if in_main else None
    show = _silent if quiet else (_bars if console.is_terminal else _lines)
    try:
        with show(console) as (progress, event):

            def told(kind: str, record: Any) -> None:
                if kind == "train":
                    training.set()
                elif kind in ("plan", "trained", "measure"):
                    training.clear()
                event(kind, record)

            yield Watch(progress=progress, event=told, stop=asked.is_set)
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _silent(console: Console) -> Generator[tuple[Any, Any]]:
    yield (lambda what, done, total: None), (lambda kind, record: None)


@contextmanager
def _lines(console: Console) -> Generator[tuple[Any, Any]]:
    """A line when something begins, every few seconds, when it ends, and for every step."""
    last: dict[str, float] = {}
    began: dict[str, float] = {}
    steps = {"max": 0, "first": 0, "since": 0.0}

    def progress(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        began.setdefault(what, now)
        if done < total and now - last.get(what, -EVERY) < EVERY:
            return
        last[what] = now
        spent = now - began[what]
        rate = (
            f"  {done / spent:.1f}/s, {_duration((total - done) * spent / done)} left"
            if done and spent
            else ""
        )
        console.print(f"{what}  {done}/{total}{rate if done < total else ''}")

    def event(kind: str, record: Any) -> None:
        if kind == "train":
            steps.update(max=record["max_steps"], first=record["step"], since=time.monotonic())
        elif kind == "step":
            done = record["step"] - steps["first"]
            each = (time.monotonic() - steps["since"]) / done
            left = _duration(each * (steps["max"] - record["step"]))
            console.print(
                f"step {record['step']}/{steps['max']}  {_step(record)}  {each:.1f} s a step, {left} left"
            )
        elif kind == "plan":
            console.print(_plan_line(record))
        elif kind == "warning":
            console.print(f"warning: {record}", style="yellow")

    yield progress, event


@contextmanager
def _bars(console: Console) -> Generator[tuple[Any, Any]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console) as bars:

        def task(what: str, total: int, done: int = 0) -> Any:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, completed=done, note="")
            return tasks[what]

        def progress(what: str, done: int, total: int) -> None:
            here = task(what, total)
            speed = bars.tasks[here].speed
            bars.update(here, completed=done, note=f"{speed:.1f}/s" if speed else "")

        def event(kind: str, record: Any) -> None:
            if kind == "train":
                task("train", record["max_steps"], record["step"])
            elif kind == "step":
                bars.update(tasks["train"], completed=record["step"], note=_step(record))
            elif kind == "plan":
                console.print(_plan_line(record))
            elif kind == "warning":
                console.print(f"warning: {record}", style="yellow")

        yield progress, event


def estimate(record: Mapping[str, Any] | None) -> str:
    """An estimate as it is written to JSON, for people.

    Example:
        >>> estimate({"value": 0.631, "low": 0.6, "high": 0.664, "n": 512, "warnings": []})
        '0.63 [0.60, 0.66]'
    """
    if record is None or record["value"] is None:
        return "unknown"
    from klimb.numbers.estimate import Estimate

    low = -math.inf if record["low"] is None else record["low"]
    high = math.inf if record["high"] is None else record["high"]
    return str(Estimate(record["value"], low, high, record["n"], tuple(record["warnings"])))


def outcome(record: Mapping[str, Any]) -> RenderableType:
    """The panel at the end of plan, train and climb, and below it the profile, if one was asked for."""
    parts: list[RenderableType] = []
    if record["measure"] is not None:
        parts.append(_measured(record["measure"], record["plan"]))
    elif record["plan"] is not None:
        parts.append(_planned(record["plan"]))
    panel = Panel(Group(*parts, *_places(record)), title="klimb", expand=False)
    return Group(panel, profile(record["profile"], record["run"])) if "profile" in record else panel


def measurement(record: Mapping[str, Any]) -> RenderableType:
    """The certificate as a panel."""
    return Panel(_measured(record), title="klimb measure", expand=False)


def samples(record: Mapping[str, Any], show: int) -> RenderableType:
    """Some completions with their rewards, and where all of them lie."""
    table = Table(
        "reward",
        "prompt",
        "completion",
        title=f"{record['draws']} draws, mean reward {estimate(record['reward'])}",
    )
    every = max(1, len(record["samples"]) // max(show, 1))  # of different prompts
    for row in record["samples"][::every][:show]:
        table.add_row(f"{row['reward']:.3f}", Text(row["prompt"]), Text(row["completion"]))
    return Group(table, Text(f"all of them: {record['path']}"))


def _planned(plan: Mapping[str, Any]) -> RenderableType:
    beta = plan["beta"]
    table = _grid()
    _aim(table, plan["target"])
    if "apart" in plan:
        _apart(table, plan["apart"], plan["advice"])
    if "optimum" not in plan:
        return table
    table.add_row("beta", f"{beta['value']:.4g} reward a nat  ({beta['why']})")
    table.add_row("reference reward", estimate(plan["reference"]["reward"]))
    _parts(table, plan)
    table.add_row("predicted optimum", estimate(plan["optimum"]["reward"]))
    table.add_row("  at KL", estimate(plan["optimum"]["kl"]) + " nats")
    for best in plan["best_of_n"][1:]:
        table.add_row(f"best of {best['n']}", f"{estimate(best['reward'])} at {best['kl']['value']:.2f} nats")
    return table


def _apart(table: Any, found: Mapping[str, Any], advice: Mapping[str, Any]) -> None:
    """How far reference and target are apart, where, what a step costs, and what to choose."""
    for name, label in (("forward", "KL(target||reference)"), ("reverse", "KL(reference||target)")):
        table.add_row(label, f"{estimate(found[name])} nats, {estimate(found[f'{name}_a_token'])} a token")
    for place in found["places"]:
        span = (
            f"{place['first']} to {place['last']}" if place["first"] < place["last"] else str(place["first"])
        )
        both = ", ".join(estimate(place[name]) for name in ("forward", "reverse") if place[name])
        table.add_row(f"  token {span}", both)
    seconds = found["seconds"]
    table.add_row(
        "a step",
        f"{found['tokens_a_step']:.0f} tokens; drawing {seconds['teacher']:.1f} s from the target, {seconds['policy']:.1f} s from the policy; "
        f"an update {seconds['update']:.1f} s; the run as configured {_duration(seconds['run'])}",
    )
    for word in advice["words"]:
        table.add_row("", Text(word))
    table.add_row("choose", f"divergence {advice['divergence']}, teacher_draws {advice['teacher_draws']:g}")


def _aim(table: Any, target: Mapping[str, Any]) -> None:
    """A row about the target, where it is not the plain tilt."""
    if "means" in target:
        table.add_row("target", Text(f"{target['kind']}: {target['means']}"))


def _measured(found: Mapping[str, Any], plan: Mapping[str, Any] | None = None) -> RenderableType:
    table = _grid()
    if "reward_model" in found:
        reward_model(table, found)
        return table
    _aim(table, found["target"])
    if "distance" in found:
        _distance(table, found["distance"])
        return table
    if "gap" not in found:
        table.add_row("trained policy", f"sequence KL {estimate(found['kl'])} nats")
        _compared(table, found)
        table.add_row("gap to the optimum", "unknown: no reward_funcs says what is good")
        return table
    table.add_row("reference reward", estimate(found["reference"]["reward"]))
    for label, best in (
        ("predicted optimum", plan and plan["optimum"]),
        ("measured optimum", found["optimum"]),
    ):
        if best:
            table.add_row(label, f"{estimate(best['reward'])} at KL {estimate(best['kl'])} nats")
    table.add_row("trained policy", estimate(found["reward"]))
    if "raw_reward" in found:
        table.add_row("  its plain reward", estimate(found["raw_reward"]["policy"]))
    table.add_row("  at sequence KL", estimate(found["kl"]) + " nats")
    _parts(table, found)
    table.add_row("gap to the optimum", f"{estimate(found['gap'])} reward  (beta {found['beta']:.4g})")
    table.add_row("share attained", estimate(found["attained"]))
    _compared(table, found)
    for label, said in verdict_rows(found["diagnosis"]):
        table.add_row(label, Text(said))
    for warning in found["warnings"]:
        table.add_row("warning", Text(warning, style="yellow"))
    return table


def _parts(table: Any, found: Mapping[str, Any]) -> None:
    """Each of several rewards by itself: its mean under the policy or else the reference, and how it orders pairs of draws."""
    for name, part in found.get("rewards", {}).items():
        mean = estimate(part.get("policy", part["reference"]))
        table.add_row(f"  {name}", f"{mean}; pairs ordered alike {estimate(part['agreement'])}")


def _distance(table: Any, found: Mapping[str, Any]) -> None:
    """How far a policy is from the policy that is its target, before and after."""
    tokens, lengths = found["tokens"], found["prompt_tokens"]
    table.add_row("KL(target||reference)", f"{estimate(found['forward_reference'])} nats")
    a_token = found["forward"]["value"] / tokens
    table.add_row("KL(target||policy)", f"{estimate(found['forward'])} nats  ({a_token:.3f} a token)")
    table.add_row("  closed", estimate(found["closed"]))
    table.add_row("KL(policy||target)", f"{estimate(found['reverse'])} nats")
    table.add_row("  before", f"{estimate(found['reverse_reference'])} nats")
    if lengths["teacher"] != lengths["policy"]:
        table.add_row("prompt", f"{lengths['policy']:.0f} tokens in the place of {lengths['teacher']:.0f}")


def _compared(table: Any, found: Mapping[str, Any]) -> None:
    """How held-out completions are ordered, where some were judged."""
    orders = found.get("comparisons")
    if not orders:
        return
    table.add_row("held-out accuracy", f"{estimate(orders['accuracy'])} of {orders['accuracy']['n']} pairs")
    table.add_row("  margin", f"{estimate(orders['margin'])} reward")
    table.add_row("  surprise", f"{estimate(orders['surprise'])} nats (0.69 knows nothing)")


def _places(record: Mapping[str, Any]) -> list[RenderableType]:
    table = _grid()
    if record["step"]:
        product = record.get("product", "policy")
        table.add_row(product.replace("_", " "), Text(f"{record['run']}/{product}"))
    table.add_row("report", Text(record["report"] or "none: pip install 'klimb[report]'"))
    return [table]


def _plan_line(record: Mapping[str, Any]) -> str:
    if "optimum" not in record:
        found, chosen = record["apart"], record["advice"]
        return (
            f"plan: KL(target||reference) {estimate(found['forward'])} nats, KL(reference||target) {estimate(found['reverse'])}; choose "
            f"{chosen['divergence']} with teacher_draws {chosen['teacher_draws']:g}"
        )
    best = record["optimum"]
    return (
        f"plan: beta {record['beta']['value']:.4g} ({record['beta']['why']}); reference "
        f"{estimate(record['reference']['reward'])}, best policy {estimate(best['reward'])} at KL "
        f"{estimate(best['kl'])} nats"
    )


def _step(record: Mapping[str, Any]) -> str:
    rates = ", ".join(f"{rate:.0f} {name}" for name, rate in record["tokens_per_second"].items())
    return f"{_found(record)}  tokens/s: {rates}"


def _found(record: Mapping[str, Any]) -> str:
    if "divergence_a_token" in record:
        return f"divergence {record['objective_value']:.2f} nats, {record['divergence_a_token']:.3f} a token"
    if "margin" in record:
        return f"accuracy {record['accuracy']:.2f}  margin {record['margin']:.2f}"
    if "reward" not in record:
        spread = record.get("residual_std")
        return "replayed" if spread is None else f"residual sd {spread:.2f} nats"
    held = record.get("evaluation")
    tail = (
        ""
        if held is None
        else f"  held out: reward {estimate(held['reward'])} attained {estimate(held['attained'])}"
    )
    reward, cost = (record[name]["value"] for name in ("reward", "kl"))
    return f"reward {'-inf' if reward is None else f'{reward:.3f}'}  KL {cost:.2f}{tail}"


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
