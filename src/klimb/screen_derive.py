"""How a derivation, a target and a table of divergences look: formulas left, digits aligned right, a mark between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from klimb.exact.check import Verdict
from klimb.exact.derivation import Derivation, Sides
from klimb.exact.divergences import Asymmetry, Row
from klimb.exact.problem import Best, Problem
from klimb.exact.remarks import Remark
from klimb.screen import estimate

BLOCKS = " ▁▂▃▄▅▆▇█"
SHOWN = 24
"""numbers of a problem up to which they are all shown"""
NAMES = {
    "reward": "E_π[r]",
    "kl_ref": "KL(π‖ref)",
    "objective": "E_π[r] − β KL(π‖ref)",
    "log_z": "log Z",
    "kl_p": "KL(π‖p)",
    "gap": "gap = β KL(π‖p)",
}


def number(value: float, digits: int = 12) -> str:
    """A number with a fixed count of decimals, as far as float64 has them; no negative zero.

    Example:
        >>> number(-1e-17, 3), number(float("inf"), 3)
        ('0.000', '∞')
    """
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "−∞"
    digits = max(0, min(digits, 16 - len(f"{abs(value):.0f}")))
    return f"{round(value, digits) + 0.0:.{digits}f}"


def bars(law: Sequence[float]) -> str:
    """A law as a row of blocks, the highest one full.

    Example:
        >>> bars([0.1, 0.0, 0.2, 0.4])
        '▂ ▄█'
    """
    top = max(law)
    return "".join(BLOCKS[round(8 * value / top)] for value in law)


def derivation(
    found: Derivation,
    remarks: Sequence[Remark],
    given: Problem,
    log_pi: Sequence[Sequence[float]],
    *,
    source: str,
    shown: str,
    run: Mapping[str, Any] | None,
) -> RenderableType:
    """The whole page: what is given, the chain, the run beside it, the remarks."""
    parts: list[RenderableType] = [_given(given, log_pi, source, shown, run)]
    width = max(
        len(text)
        for sides in (s for part in (*found.steps, *remarks) for s in part.sides)
        for text in (sides.left, sides.right)
    )
    for step in found.steps:
        parts += [
            Text(),
            _title(str(step.number), step.title),
            Padding(Text(step.formula, style="cyan"), (0, 0, 0, 5)),
            *(_sides(sides, width, found.tolerance) for sides in step.sides),
            Padding(Text(step.why, style="dim"), (0, 0, 0, 5)),
        ]
    parts += [Text(), Text("     In one line, back in units of reward", style="bold")]
    parts.append(_sides(found.identity, width, found.tolerance))
    mark = ("holds", "green") if found.holds else ("DOES NOT HOLD", "bold red")
    said = (
        f" at the policy shown and at {found.num_random} random ones. The small number on the right is the largest "
        f"difference among all of them; over the whole chain it is {found.worst:.1e}, and rounding allows "
        f"{found.tolerance:.0e}."
    )
    parts += [Text(), Padding(Text.assemble("The chain ", mark, said), (0, 0, 0, 5))]
    if run is not None and run["weighted"] is not None:
        parts += [Text(), _run(run)]
    parts += [Text(), Rule("Remarks", style="dim")]
    for letter, remark in zip("abcdefgh", remarks, strict=False):
        parts += _remark(letter, remark, width, found.tolerance)
    return Group(*parts)


def verdict(found: Verdict) -> RenderableType:
    """What a check found, with its counterexample."""
    sign = ("✓ ", "bold green") if found.right else ("✗ ", "bold red")
    end = "" if found.step is None else f"   fails at step ({found.step})"
    parts: list[RenderableType] = [
        Text.assemble(sign, (found.asked, "bold"), (end, "red")),
        Padding(Text(found.formula, style="cyan"), (0, 0, 0, 5)),
        Padding(Text(found.says), (0, 0, 0, 5)),
    ]
    if found.elsewhere:
        parts.append(
            Padding(
                Text(
                    "It does not show on the numbers given; on the built-in example it does:", style="yellow"
                ),
                (0, 0, 0, 5),
            )
        )
    if found.sides is not None:
        width = max(len(found.sides.left), len(found.sides.right))
        parts += [Text(), _sides(found.sides, width, found.sides.worst * 2 if found.right else 0.0)]
    if found.witnesses:
        table = _table("policy", "E_π[r] − β KL(π‖ref)", "the changed cost", "KL(π‖p)")
        for row in found.witnesses:
            values = (number(x, 6) for x in (row.objective, row.changed, row.distance))
            table.add_row(row.policy, *values)
        parts += [
            Text(),
            Padding(table, (0, 0, 0, 5)),
            Padding(
                Text("Less of the changed cost, and less of the true objective: another optimum."),
                (0, 0, 0, 5),
            ),
        ]
    elif found.moves_optimum is False and not found.right:
        parts.append(Padding(Text("The optimum does not move on these numbers."), (0, 0, 0, 5)))
    return Group(*parts)


def target(found: Sequence[Best], ref: Sequence[float], reward: Sequence[float]) -> RenderableType:
    """The best policy in full if there is one beta, else a row a beta."""
    if len(found) > 1:
        table = _table("β", "E_p[r]", "KL(p‖ref)", "KL(ref‖p)", "log Z", "β log Z", "H(p)", "p", left=(0, 7))
        for at in found:
            values = (at.reward, at.kl_p_ref, at.kl_ref_p, at.log_z, at.objective, at.entropy)
            table.add_row(
                f"{at.beta:g}", *(number(x, 6) for x in values), bars(at.p) if len(at.p) <= SHOWN else ""
            )
        return table
    (at,) = found
    table = _table("", *(f"y{i}" for i in range(1, len(ref) + 1)))
    if len(ref) <= SHOWN:
        for name, row in (("ref", ref), ("r", reward), ("p", at.p)):
            table.add_row(name, *(number(x, 6) for x in row))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(justify="right")
    facts.add_column(style="dim")
    for name, value, unit in (
        ("log Z", at.log_z, "nats"),
        ("β log Z", at.objective, "reward: the most that E_π[r] − β KL(π‖ref) can be"),
        ("E_p[r]", at.reward, f"reward, from {number(at.reward_ref, 6)} under ref"),
        ("KL(p‖ref)", at.kl_p_ref, "nats"),
        ("KL(ref‖p)", at.kl_ref_p, "nats"),
        ("H(p)", at.entropy, f"nats, from {number(at.entropy_ref, 6)} under ref"),
    ):
        facts.add_row(Text(name), number(value), Text(unit))
    grid: list[RenderableType] = [table] if len(ref) <= SHOWN else []
    return Panel(Group(*grid, Text(), facts), title=f"target   p = ref exp(r/{at.beta:g}) / Z", expand=False)


def divergences(rows: Sequence[Row], found: Asymmetry) -> RenderableType:
    """The table of divergences both ways, and what the asymmetry says."""
    table = _table("", "D(P‖Q)", "D(Q‖P)", "at most", "D(P‖Q) =", left=(0, 4))
    for row in rows:
        back = "same" if row.symmetric else number(row.backward, 6)
        formula = Text(row.formula, style="dim")
        table.add_row(row.name, number(row.forward, 6), back, number(row.most, 4), formula)
    footnote = Text("M: P and Q mixed in the same shares", style="dim")
    return Group(table, footnote, Text(), Text(found.says))


def _given(
    given: Problem,
    log_pi: Sequence[Sequence[float]],
    source: str,
    shown: str,
    run: Mapping[str, Any] | None,
) -> RenderableType:
    prompts, outcomes = given.log_ref.shape
    counted = given.support.sum(1)
    least, most = int(counted.min()), int(counted.max())
    size = f"{most}" if least == most else f"{least} to {most}"
    head = f"{prompts} prompt{'s' * (prompts > 1)}, {size} outcomes, β = {given.beta:.6g} reward a nat; from {source}"
    parts: list[RenderableType] = [Text(head)]
    if given.log_ref.numel() <= SHOWN:
        table = _table("", *(f"y{i}" for i in range(1, outcomes + 1)), "", left=(0, outcomes + 1))
        rows = zip(
            given.log_ref.exp().tolist(),
            given.reward.tolist(),
            given.log_p.exp().tolist(),
            log_pi,
            strict=True,
        )
        for x, (ref, reward, p, pi) in enumerate(rows):
            name = "" if prompts == 1 else f"x{x + 1}  "
            log_z = f"log Z = {number(given.log_z[x].item(), 6)}"
            for label, values, note in (
                (f"{name}ref", ref, bars(ref)),
                (f"{name}r", reward, ""),
                (f"{name}p", p, f"{bars(p)}  {log_z}"),
                (f"{name}π", pi, f"{bars(pi)}  {shown}"),
            ):
                table.add_row(label, *(number(v, 4) for v in values), Text(note))
        parts += [Text(), table]
    if run is not None:
        forbidden = f" ({run['forbidden']} forbidden ones left out)" if run["forbidden"] else ""
        mass = "; ".join(f"{100 * share:.2g} % of the {who}'s mass" for who, share in run["mass"].items())
        parts.append(
            Text(
                f"{run['completions']} distinct completions of {', '.join(run['draws'])}{forbidden}, holding {mass}. "
                f"Renormalised over them they are a space of their own, as wide as {run['effective']:.1f} equally likely "
                f"completions under π, {shown}.",
                style="dim",
            )
        )
    return Panel(Group(*parts), title="klimb derive", expand=False)


def _sides(sides: Sides, width: int, tolerance: float) -> RenderableType:
    """Left over right, the digits under each other, and how far they part."""
    equal = sides.worst <= tolerance
    figures = [number(x) for x in (sides.left_value, sides.right_value)]
    across = max(20, *(len(figure) for figure in figures))
    style = "green" if equal else "bold red"
    lines = Text(no_wrap=True, overflow="ellipsis")
    lines.append(f"       {sides.left:<{width}}   {figures[0]:>{across}}\n")
    lines.append(f"     {'=' if equal else '≠'} ", style=style)
    lines.append(f"{sides.right:<{width}}   {figures[1]:>{across}}")
    lines.append(f"   {sides.worst:.0e}", style=style)
    return lines


def _remark(letter: str, remark: Remark, width: int, tolerance: float) -> list[RenderableType]:
    parts: list[RenderableType] = [
        Text(),
        _title(letter, remark.title),
        *(_sides(sides, width, tolerance) for sides in remark.sides),
    ]
    if remark.pictures:
        longest = max(len(name) for name, _ in remark.pictures)
        parts.append(Text("\n".join(f"     {name:<{longest}}  {bars(law)}" for name, law in remark.pictures)))
    if remark.rows:
        table = _table(*remark.columns)
        for row in remark.rows:
            table.add_row(*(Text(cell) if isinstance(cell, str) else number(cell, 6) for cell in row))
        parts.append(Padding(table, (0, 0, 0, 5)))
    return [*parts, Padding(Text(remark.says, style="dim"), (0, 0, 0, 5))]


def _run(run: Mapping[str, Any]) -> RenderableType:
    table = _table("", "on the draws", "draws, weighted", "whole space", left=(0, 3))
    estimates = run["estimates"]
    for name, value in run["restricted"].items():
        beside = "not measured" if estimates is None else estimate(estimates[name])
        table.add_row(
            Text(NAMES[name]), number(value, 6), number(run["weighted"][name], 6), Text(beside, no_wrap=True)
        )
    note = (
        "Each column is a space of its own, and the identity holds in each. On the draws: the laws renormalised over the "
        "distinct completions, so the likeliest few count for nearly all. Weighted: each completion counts as often as "
        "it stands for others that were not drawn (law / law that drew). Whole space: what measure estimated, with "
        "95 % intervals."
    )
    return Group(
        Text("The run: the same quantities on its draws and for all completions", style="bold"),
        Padding(table, (0, 0, 0, 5)),
        Padding(Text(note, style="dim"), (0, 0, 0, 5)),
    )


def _title(mark: str, title: str) -> RenderableType:
    grid = Table.grid()
    grid.add_column(width=5, style="bold cyan")
    grid.add_column(style="bold")
    grid.add_row(Text(f"({mark})"), Text(title))
    return grid


def _table(*columns: str, left: Sequence[int] = (0,)) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for i, column in enumerate(columns):
        # as Text: E_p[r] is not markup
        table.add_column(Text(column), justify="left" if i in left else "right", no_wrap=i == 0)
    return table
